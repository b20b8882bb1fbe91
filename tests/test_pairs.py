"""Options across slots meet: each of 200 pairs, spread over the whole table, trains two steps or is refused."""

import pytest

from tests.exhaustive import pairs

ALL = list(pairs.all_pairs())
SAMPLE = ALL[:: len(ALL) // 200]


def test_the_table_is_whole():
    assert len(ALL) > 5000
    assert len(SAMPLE) >= 200


@pytest.mark.parametrize("pair", SAMPLE, ids=lambda p: "-".join("=".join(option) for option in p))
def test_it_trains_or_is_refused_with_a_reason(pair):
    row = pairs.try_pair(pair)
    assert row["outcome"] != "failed", row["reason"]
    assert row["outcome"] == "trained" or ": write " in row["reason"] or "must" in row["reason"], row

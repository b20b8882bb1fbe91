"""What an option costs: pairs of runs, of which the saving ones save."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.bench import bars, overhead
from scripts.bench.watch import Timing


def test_short_runs_save_twice_and_the_cost_is_scaled_to_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def fake(case: Any, data: Any, given: list[str]) -> Timing:
        lines.extend(given)
        seconds = 12.0 if given[0].endswith("=6") else 10.0
        return Timing(seconds, seconds)

    monkeypatch.setattr(overhead, "prepared", lambda case: None)
    monkeypatch.setattr(overhead, "knep", fake)
    found = overhead.overhead("saving", ["cnn_512"], repeats=2, count=12)
    assert set(lines) == {"checkpoint.every=6", "checkpoint.every=null"}
    assert found["cnn_512"] == dict.fromkeys(("wall", "wall_fastest", "cpu", "cpu_fastest"), 0.006) | {
        "steps": 12,
        "every": 6,
    }
    (row,) = bars.rows("saving", found)
    assert row[2].endswith("over 12 steps, saved every 6 and scaled")
    assert row[3] == "pass"


def test_long_runs_save_at_the_interval_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"checkpoint.every=200": 11.0, "checkpoint.every=null": 10.0}
    monkeypatch.setattr(overhead, "prepared", lambda case: None)
    monkeypatch.setattr(overhead, "knep", lambda case, data, given: Timing(taken[given[0]], taken[given[0]]))
    found = overhead.overhead("saving", ["mlp_64"], repeats=2, count=None)
    assert found["mlp_64"]["cpu"] == pytest.approx(0.1)
    (row,) = bars.rows("saving", found)
    assert (row[2].endswith("over 400 steps"), row[3]) == (True, "short")

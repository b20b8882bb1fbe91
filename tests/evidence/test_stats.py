"""Intervals, corrections and verdicts on synthetic pairs of runs whose effect is known."""

import numpy as np
import pytest

from knep.evidence.stats import Effect, holm, interval, paired, prediction_interval, verdict
from tests.exhaustive.intervals import coverage


@pytest.mark.parametrize("n", [5, 10])
def test_students_interval_covers_the_truth_in_93_to_97_per_cent_of_1000_simulations(n):
    assert 0.93 <= coverage(n, 1000).t <= 0.97


@pytest.mark.parametrize(("n", "least"), [(5, 0.80), (10, 0.88)])
def test_the_bootstrap_covers_less_on_few_pairs_and_not_much_less(n, least):
    """BCa is too narrow there (tests/exhaustive/intervals.py measures it), so that the verdict goes by Student's t."""
    assert least <= coverage(n, 150).bootstrap <= 0.97


def test_a_trick_that_does_nothing_is_no_evidence():
    rng = np.random.default_rng(1)
    said = []
    for _ in range(60):
        a, b = rng.normal(0.97, 0.01, (2, 10))
        effects = [paired(a, b), *(paired(*rng.normal(0.97, 0.01, (2, 10))) for _ in range(4))]
        said += [verdict(e, p) for e, p in zip(effects, holm([e.p for e in effects]), strict=True)]
    assert said.count("no evidence") >= 0.98 * len(said)
    same = paired([0.9, 0.95, 0.97], [0.9, 0.95, 0.97])
    assert verdict(same, same.p) == "no evidence"


def test_a_large_effect_is_found_with_its_sign():
    a = np.random.default_rng(2).normal(0.9, 0.01, 10)
    up, down = paired(a + 0.03, a), paired(a - 0.03, a)
    assert (verdict(up, up.p), verdict(down, down.p)) == ("helps", "hurts")
    noisy = paired([0.93, 0.95, 0.94, 0.96], [0.90, 0.91, 0.90, 0.92])
    assert noisy.mean == pytest.approx(0.0375)
    assert noisy.low == pytest.approx(0.0375 - 3.182446 * 0.005 / 2, abs=1e-5)


def test_holm_against_a_case_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, the last raised to its predecessor.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_significant_p_whose_correction_is_not_is_no_evidence():
    effect = Effect(0.01, 0.001, 0.019, 0.001, 0.019, 0.03, 10)
    assert verdict(effect, 0.03) == "helps"
    assert verdict(effect, 0.09) == "no evidence"


@pytest.mark.parametrize("runs", [1, 2])
def test_a_prediction_interval_holds_further_runs(runs):
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(1000):
        low, high = prediction_interval(rng.normal(0, 1, 10), runs)
        inside += low <= rng.normal(0, 1, runs).mean() <= high
    assert 930 <= inside <= 970
    low, high = interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)


@pytest.mark.parametrize("sides", [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_pairs_that_are_none_are_refused(sides):
    with pytest.raises(ValueError, match="two pairs"):
        paired(*sides)

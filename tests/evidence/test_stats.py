"""Intervals, corrections and verdicts on synthetic pairs of runs whose effect is known."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from knep.evidence.stats import Effect, holm, interval, paired, sign_flip, verdict
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
    same = paired([0.9, 0.95, 0.97, 0.93, 0.9], [0.9, 0.95, 0.97, 0.93, 0.9])
    assert verdict(same, same.p) == "no evidence"


def test_a_large_effect_is_found_with_its_sign():
    a = np.random.default_rng(2).normal(0.9, 0.01, 10)
    up, down = paired(a + 0.03, a), paired(a - 0.03, a)
    assert (verdict(up, up.p), verdict(down, down.p)) == ("helps", "hurts")
    noisy = paired([0.93, 0.95, 0.94, 0.96], [0.90, 0.91, 0.90, 0.92], resolution=0.001)
    assert noisy.mean == pytest.approx(0.0375)
    assert noisy.low == pytest.approx(0.0375 - 3.182446 * 0.005 / 2, abs=1e-5)


def test_holm_against_a_case_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, the last raised to its predecessor.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_significant_p_whose_correction_is_not_is_no_evidence():
    effect = Effect(0.01, 0.001, 0.019, 0.001, 0.019, 0.03, 0.03, 10)
    assert verdict(effect, 0.03) == "helps"
    assert verdict(effect, 0.09) == "no evidence"
    assert verdict(replace(effect, p_flip=0.06), 0.03) == "no evidence"
    assert verdict(replace(effect, p_flip=0.0625, n=5), 0.03) == "helps"  # the least that five pairs can have
    assert verdict(replace(effect, n=4), 0.03) == "too few pairs"


def test_the_sign_flip_test_against_cases_by_hand():
    # Sums of +-1 +-2 +-3: 6, 4, 2, 0, 0, -2, -4, -6; as far from 0 as 6 are two of eight, as 2 six of eight.
    assert sign_flip([1, 2, 3]) == 2 / 8
    assert sign_flip([1, 0, 3]) == 4 / 8
    assert sign_flip([1, -2, 3]) == 6 / 8
    assert sign_flip([0.1] * 10) == 2 / 1024
    assert sign_flip([0, 0, 0]) == 1.0
    many = np.random.default_rng(0).normal(0.5, 1, 24)
    assert sign_flip(many) == pytest.approx(paired(many, np.zeros(24)).p, rel=0.3)


def test_the_sign_flip_test_holds_its_level():
    rng = np.random.default_rng(5)
    found = [sign_flip(rng.standard_t(2, 10)) for _ in range(2000)]
    assert 0.03 <= np.mean(np.array(found) <= 0.05) <= 0.06  # of heavy tails too


@pytest.mark.parametrize("n", [2, 5, 10])
def test_one_and_the_same_difference_in_all_pairs_is_no_certainty(n):
    a = 0.9 + np.arange(n) / 359
    found = paired(a + 1 / 359, a)
    assert found.mean == pytest.approx(1 / 359)
    assert found.high - found.mean == pytest.approx(student(n) / 359 / n**0.5)  # the deviation is that of one image
    assert found.low < found.mean < found.high
    assert found.p > 0
    assert verdict(found, found.p) == ("too few pairs" if n == 2 else "helps" if n == 10 else "no evidence")


def test_what_runs_can_differ_by_bounds_their_deviation_from_below():
    a, b = np.array([0.91, 0.93, 0.9, 0.92, 0.95]), np.full(5, 0.9)
    known, guessed = paired(a, b, resolution=0.05), paired(a, b)
    assert known.high - known.low == pytest.approx(2 * student(5) * 0.05 / 5**0.5)
    assert guessed.high - guessed.low == pytest.approx(2 * student(5) * np.std(a, ddof=1) / 5**0.5)
    same = paired([0.9] * 5, [0.9] * 5)
    assert (same.mean, same.low, same.high, same.p, same.p_flip) == (0, 0, 0, 1, 1)


def student(n):
    return scipy.stats.t.ppf(0.975, n - 1)


def test_the_interval_of_a_mean_by_hand():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - student(3) / 3**0.5, 2 + student(3) / 3**0.5))


@pytest.mark.parametrize("sides", [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_pairs_that_are_none_are_refused(sides):
    with pytest.raises(ValueError, match="two pairs"):
        paired(*sides)

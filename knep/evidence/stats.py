"""What may be said from a few paired runs: intervals, corrected p-values, verdicts.

Arms of a study share their seeds, so that the same data order and, where shapes agree, the same start are compared: the
paired difference is free of what a seed does to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
VERDICTS = ("helps", "hurts", "no evidence", "too few pairs")
LEAST_PAIRS = 5  # of a verdict: two or three pairs that agree by chance look like certainty
_FLIPS = 1 << 16  # choices of signs


@dataclass(frozen=True)
class Effect:
    """A mean paired difference with its intervals. n: pairs.

    low, high: by Student's t; boot_low, boot_high: by the bias-corrected and accelerated bootstrap (Efron 1987),
    Student's where there are too few distinct differences for it. p: of Student's paired t-test, p_flip: of the
    sign-flip test; both two-sided.
    """

    mean: float
    low: float
    high: float
    boot_low: float
    boot_high: float
    p: float
    p_flip: float
    n: int


def paired(
    treated: Sequence[float], control: Sequence[float], level: float = LEVEL, resolution: float | None = None
) -> Effect:
    """The effect of a treatment on pairs of runs that share a seed.

    resolution: the least by which two values can differ, such as the share of one test image; by default the least by
    which these do. The deviation of the differences counts as no smaller: pairs that agree to the last image, of which
    there are some among few, do not mean that the next will.
    Raises ValueError for fewer than two pairs, or for sides of different length.
    """
    if len(treated) != len(control) or len(treated) < 2:
        raise ValueError(f"an interval takes two pairs or more, got {len(treated)} and {len(control)} runs")
    d = np.asarray(treated, float) - np.asarray(control, float)
    least = _least_step([*treated, *control]) if resolution is None else resolution
    mean, spread = float(d.mean()), max(float(d.std(ddof=1)), least)
    if spread == 0.0:  # one and the same value in every run
        return Effect(mean, mean, mean, mean, mean, 1.0, 1.0, len(d))
    error = spread / len(d) ** 0.5
    half = float(stats.t.ppf((1 + level) / 2, len(d) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(d) - 1))
    low, high = _bootstrap(d, level) or (mean - half, mean + half)
    return Effect(mean, mean - half, mean + half, low, high, p, sign_flip(d), len(d))


def _least_step(values: Sequence[float]) -> float:
    """The least distance between two of the values that is more than rounding; 0 where all are equal."""
    steps = np.diff(np.sort(np.asarray(values, float)))
    steps = steps[steps > 1e-9 * max(1.0, float(np.abs(values).max()))]
    return float(steps.min()) if len(steps) else 0.0


def sign_flip(differences: Sequence[float] | np.ndarray) -> float:
    """p, two-sided, that the mean of differences symmetric around 0 lies as far from 0 (Fisher 1935, section 21).

    Exact up to 16 pairs, where its least value is 2^(1 - n); of more by 65,536 choices of signs, always the same ones.
    """
    d = np.asarray(differences, float)
    if not d.any():
        return 1.0
    d = d / np.abs(d).max()  # so that one rounding does for accuracies and losses: ties hang on no last bit
    found = stats.permutation_test((d,), _rounded_sum, permutation_type="samples", n_resamples=_FLIPS, rng=0)
    return float(found.pvalue)


def _rounded_sum(values: np.ndarray, axis: int) -> np.ndarray:
    return np.round(values.sum(axis=axis), 9)


def _bootstrap(d: np.ndarray, level: float) -> tuple[float, float] | None:
    if len(np.unique(d)) < 3:  # the jackknife of the acceleration has nothing to vary
        return None
    found = stats.bootstrap(
        (d,), np.mean, confidence_level=level, n_resamples=4999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down (Holm 1979), in the order given."""
    order = np.argsort(ps)
    corrected, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = worst
    return corrected


def verdict(effect: Effect, corrected_p: float, level: float = LEVEL, mode: str = "max") -> str:
    """ "helps", "hurts", "no evidence" or "too few pairs", for a quantity that should be high ("max") or low ("min").

    Student's t, corrected, and the sign-flip test, which believes in no normal law, must agree. Of five pairs that
    test's least p is 1/16, which then counts: all five have the same sign.
    """
    if effect.n < LEAST_PAIRS:
        return "too few pairs"
    flips = max(1 - level, 2.0 ** (1 - effect.n))
    if corrected_p >= 1 - level or effect.low <= 0 <= effect.high or effect.p_flip > flips * (1 + 1e-9):
        return "no evidence"
    return "helps" if (effect.mean > 0) == (mode == "max") else "hurts"


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of two values or more."""
    v = np.asarray(values, float)
    half = float(stats.t.ppf((1 + level) / 2, len(v) - 1)) * float(v.std(ddof=1)) / len(v) ** 0.5
    return float(v.mean()) - half, float(v.mean()) + half

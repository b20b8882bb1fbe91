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


@dataclass(frozen=True)
class Effect:
    """A mean paired difference with its intervals. p: of Student's paired t-test, two-sided; n: pairs.

    low, high: by Student's t; boot_low, boot_high: by the bias-corrected and accelerated bootstrap (Efron 1987), the
    range of the differences where there are too few distinct ones for it.
    """

    mean: float
    low: float
    high: float
    boot_low: float
    boot_high: float
    p: float
    n: int


def paired(treated: Sequence[float], control: Sequence[float], level: float = LEVEL) -> Effect:
    """The effect of a treatment on pairs of runs that share a seed.

    Raises ValueError for fewer than two pairs, or for sides of different length.
    """
    if len(treated) != len(control) or len(treated) < 2:
        raise ValueError(f"an interval takes two pairs or more, got {len(treated)} and {len(control)} runs")
    d = np.asarray(treated, float) - np.asarray(control, float)
    mean, spread = float(d.mean()), float(d.std(ddof=1))
    if np.ptp(d) <= 1e-12 * max(1.0, abs(mean)):  # one and the same difference in every pair
        return Effect(mean, mean, mean, mean, mean, 1.0 if mean == 0 else 0.0, len(d))
    half = float(stats.t.ppf((1 + level) / 2, len(d) - 1)) * spread / len(d) ** 0.5
    p = float(2 * stats.t.sf(abs(mean) / (spread / len(d) ** 0.5), len(d) - 1))
    low, high = _bootstrap(d, level)
    return Effect(mean, mean - half, mean + half, low, high, p, len(d))


def _bootstrap(d: np.ndarray, level: float) -> tuple[float, float]:
    if len(np.unique(d)) < 3:  # the jackknife of the acceleration has nothing to vary
        return float(d.min()), float(d.max())
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


def verdict(effect: Effect, corrected_p: float, level: float = LEVEL) -> str:
    """ "helps", "hurts" or "no evidence", for a quantity that should be high."""
    if corrected_p >= 1 - level or effect.low <= 0 <= effect.high:
        return "no evidence"
    return "helps" if effect.mean > 0 else "hurts"


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of two values or more."""
    v = np.asarray(values, float)
    half = float(stats.t.ppf((1 + level) / 2, len(v) - 1)) * float(v.std(ddof=1)) / len(v) ** 0.5
    return float(v.mean()) - half, float(v.mean()) + half


def prediction_interval(values: Sequence[float], runs: int = 1, level: float = LEVEL) -> tuple[float, float]:
    """Where the mean of `runs` further runs should lie: mean +- t s sqrt(1/n + 1/runs), from two values or more."""
    v = np.asarray(values, float)
    scale = float(v.std(ddof=1)) * (1 / len(v) + 1 / runs) ** 0.5
    half = float(stats.t.ppf((1 + level) / 2, len(v) - 1)) * scale
    return float(v.mean()) - half, float(v.mean()) + half

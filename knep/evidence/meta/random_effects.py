"""Effects of one trick on several workloads, pooled by a random-effects meta-analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from knep.evidence.stats import LEVEL

LEAST = 3  # workloads: of two the deviation between them is hardly known


@dataclass(frozen=True)
class Pooled:
    """mean: of the effects that workloads like these have; low, high: its interval; p: two-sided, that it is 0.

    tau: the deviation of effects between workloads, in the effects' unit; i2: the share of the variance of what was
    measured that comes from there and not from noise, 0 to 1; q: Cochran's, on workloads - 1 degrees of freedom.
    new_low, new_high: the prediction interval, where the effect on one more workload of the kind should lie.
    """

    mean: float
    low: float
    high: float
    p: float
    tau: float
    i2: float
    q: float
    new_low: float
    new_high: float
    workloads: int


def pool(effects: Sequence[float], errors: Sequence[float], level: float = LEVEL) -> Pooled:
    """Of effects with their standard errors, one of each workload.

    The variance between workloads, tau^2, is that of DerSimonian and Laird (1986): max(0, (Q - (k - 1)) / C), with
    w = 1 / error^2, Q = sum w (y - sum w y / sum w)^2 and C = sum w - sum w^2 / sum w. The mean has the weights
    1 / (error^2 + tau^2); its interval is Hartung and Knapp's (2001), by Student's t on k - 1 degrees of freedom and
    never narrower than the usual one (Roever, Knapp and Friede 2015), for three or four workloads seem to agree too
    often by chance. The prediction interval is mean +- t sqrt(tau^2 + error of the mean^2) (Higgins, Thompson and
    Spiegelhalter 2009), on k - 1 degrees of freedom as well (IntHout et al. 2016).

    Raises ValueError for fewer than three workloads, or an error that is not above 0.
    """
    y, variances = np.asarray(effects, float), np.asarray(errors, float) ** 2
    k = len(y)
    if k < LEAST or k != len(variances) or not (variances > 0).all():
        raise ValueError(f"pooling takes {LEAST} effects or more, of errors above 0, got {effects} and {errors}")
    w = 1 / variances
    q = float((w * (y - (w * y).sum() / w.sum()) ** 2).sum())
    tau2 = max(0.0, (q - (k - 1)) / float(w.sum() - (w**2).sum() / w.sum()))
    w = 1 / (variances + tau2)
    mean = float((w * y).sum() / w.sum())
    scale = max(1.0, float((w * (y - mean) ** 2).sum()) / (k - 1))
    error = (scale / float(w.sum())) ** 0.5
    t = float(stats.t.ppf((1 + level) / 2, k - 1))
    wide = t * (tau2 + error**2) ** 0.5
    return Pooled(
        mean=mean,
        low=mean - t * error,
        high=mean + t * error,
        p=float(2 * stats.t.sf(abs(mean) / error, k - 1)),
        tau=tau2**0.5,
        i2=max(0.0, 1 - (k - 1) / q) if q > 0 else 0.0,
        q=q,
        new_low=mean - wide,
        new_high=mean + wide,
        workloads=k,
    )

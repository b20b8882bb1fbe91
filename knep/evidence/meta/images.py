"""Intervals that cover other test images too: a bootstrap over seeds x images."""

from __future__ import annotations

import numpy as np

from knep.evidence.stats import LEVEL


def two_way(
    treated_SN: np.ndarray, control_SN: np.ndarray, level: float = LEVEL, rounds: int = 2000
) -> tuple[float, float]:
    """Interval of a difference of accuracies, of seeds and of images from the populations of which these are samples.

    treated_SN, control_SN: whether a seed's network is right on an image, both sides with the same seeds and images.
    Rows and columns are drawn with replacement, each by itself (the pigeonhole bootstrap: Owen 2007), always the same
    draws; its intervals err on the wide side, for what neither explains is counted twice. The splits stay those of the
    data set: what another training set would do is not covered.

    Raises ValueError for sides of different shapes.
    """
    if treated_SN.shape != control_SN.shape or treated_SN.ndim != 2:
        raise ValueError(f"seeds x images of both sides, got {treated_SN.shape} and {control_SN.shape}")
    d_SN = treated_SN.astype(np.float32) - control_SN.astype(np.float32)
    seeds, images = d_SN.shape
    rng = np.random.default_rng(0)
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), rounds).astype(np.float32)
    means = np.empty(rounds)
    for i in range(rounds):
        columns = rng.multinomial(images, np.full(images, 1 / images)).astype(np.float32)
        means[i] = rows[i] @ (d_SN @ columns) / (seeds * images)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

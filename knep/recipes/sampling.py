"""`sampling`: how often a row is drawn in an epoch. `f(targets) -> weights (N,) | None`, of the training split.

An epoch has as many rows as the split, drawn with replacement in proportion to the weights; the draws follow from seed
and epoch, so that a resumed run goes on with the same. None takes each row once, in a random order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knep.errors import InputError

__all__ = ["balanced", "none", "sqrt"]


def none(targets: Tensor) -> None:
    """Each row once an epoch."""


def balanced(targets: Tensor) -> Tensor:
    """1 / n_k for a row of class k: all classes are drawn equally often (Shen et al. 2016).

    targets: int64 (N,). Raises InputError for others.
    """
    return 1 / _counts(targets)


def sqrt(targets: Tensor) -> Tensor:
    """1 / sqrt(n_k) for a row of class k: classes are drawn in proportion to sqrt(n_k) (Mahajan et al. 2018).

    Between the split as it is and `balanced`, where rare rows are seen so often that they are learned by heart.
    targets: int64 (N,). Raises InputError for others.
    """
    return 1 / _counts(targets).sqrt()


def _counts(targets: Tensor) -> Tensor:
    """How many rows have the class of each, float64 (N,)."""
    if targets.ndim != 1 or targets.is_floating_point():
        raise InputError(
            f"rows can be drawn by their class where each has one, and targets are {tuple(targets.shape)} of "
            f"{targets.dtype}: write sampling=none"
        )
    return torch.bincount(targets)[targets].double()

"""Means of weights: of all of several, or of those that a loss says (model soups, Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def mean_of(states: Sequence[State]) -> dict[str, Tensor]:
    """The uniform soup: the mean of each tensor, taken in float64, in the type that the first has."""
    return {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(first.dtype)
        for key, first in states[0].items()
    }


def greedy(states: Sequence[State], loss: Callable[[State], float]) -> tuple[list[int], float]:
    """The greedy soup, recipe 1: each of the states, best first, stays where the mean with it is no worse.

    loss: of a mean, on data for choosing; less is better. Returns the places of those that stayed, and their loss.
    """
    kept, best = [0], loss(mean_of(states[:1]))
    for i in range(1, len(states)):
        tried = loss(mean_of([states[j] for j in (*kept, i)]))
        if tried <= best:
            kept, best = [*kept, i], tried
    return kept, best

"""The ledger's effects against any option of a slot, on a scale on which halving and doubling the error are as far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from knep.evidence.stats import paired

IMAGES = 359  # of the digits' test, where a cell does not say how many there were


class OnWorkload(NamedTuple):
    """value: log(error without the trick / error with it), above 0 where it helps; error: its standard error.

    sides: the accuracies with and without it, by seed; least: by how much two can differ.
    """

    value: float
    error: float
    sides: tuple[list[float], list[float]]
    least: float

    @property
    def p(self) -> float:
        """Of Student's paired t-test, two-sided."""
        return paired(*self.sides, resolution=self.least).p


Effects = dict[tuple[str, str], dict[str, OnWorkload]]  # (slot, option) -> workload -> what was measured there


def share(value: float) -> float:
    """The share of the error that is removed, for a value of `OnWorkload`; below 0 where the error grows."""
    return 1 - math.exp(-value)


def measured(ledger: Mapping[str, Sequence[Mapping[str, Any]]], current: Mapping[str, str]) -> Effects:
    """Every option of the ledger against the slot's current one, by runs that share workload and seed.

    current: slot -> option. Left out: uses that a card advises against, slots whose current option is unmeasured.
    """
    found: Effects = {}
    for slot, rows in ledger.items():
        known = {(c["option"], c["workload"]): c for c in rows if "test_acc" in c}
        for (option, workload), cell in known.items():
            plain = known.get((current.get(slot, ""), workload))
            if plain is not None and cell is not plain and not cell.get("against"):
                one = _on(cell, plain)
                if one is not None:
                    found.setdefault((slot, option), {})[workload] = one
    return found


def _on(cell: Mapping[str, Any], control: Mapping[str, Any]) -> OnWorkload | None:
    """None where fewer than two seeds are shared."""
    side, plain = (dict(zip(c["seeds"], c["test_acc"], strict=True)) for c in (cell, control))
    seeds = [seed for seed in side if seed in plain]
    if len(seeds) < 2:
        return None
    least = 1 / (cell.get("test_images") or IMAGES)
    accuracies = [side[seed] for seed in seeds], [plain[seed] for seed in seeds]
    errors, others = (np.maximum(1 - np.asarray(values), 0) for values in accuracies)
    with_trick, without = (max(float(values.mean()), least / 2) for values in (errors, others))
    relative = others / without - errors / with_trick  # deviates as the logarithm does, to first order
    spread = max(float(relative.std(ddof=1)), least / without)
    return OnWorkload(math.log(without / with_trick), spread / len(seeds) ** 0.5, accuracies, least)

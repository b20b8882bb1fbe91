"""The ledger's effects against any option of a slot, on a scale on which halving and doubling the error are as far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from knep.evidence.stats import Effect, paired

IMAGES = 359  # of the digits' test, where a cell does not say how many there were


class OnWorkload(NamedTuple):
    """value: log(error without the trick / error with it), above 0 where it helps; error: its standard error.

    effect: the same runs' paired difference of accuracies.
    """

    value: float
    error: float
    effect: Effect


Effects = dict[tuple[str, str], dict[str, OnWorkload]]  # (slot, option) -> workload -> what was measured there


def share(value: float) -> float:
    """The share of the error that is removed, for a value of `OnWorkload`; below 0 where the error grows."""
    return 1 - math.exp(-value)


def measured(ledger: Mapping[str, Sequence[Mapping[str, Any]]], current: Mapping[str, str]) -> Effects:
    """Every option of the ledger against the slot's current one, by runs that share workload and seed.

    current: slot -> option. Uses that a card advises against are left out, and slots whose current option is unmeasured.
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


def _on(cell: Mapping[str, Any], plain: Mapping[str, Any]) -> OnWorkload | None:
    """None where fewer than two seeds are shared."""
    sides = [dict(zip(c["seeds"], c["test_acc"], strict=True)) for c in (cell, plain)]
    seeds = [seed for seed in sides[0] if seed in sides[1]]
    if len(seeds) < 2:
        return None
    least = 1 / (cell.get("test_images") or IMAGES)
    accuracies = [[side[seed] for seed in seeds] for side in sides]
    treated, control = (np.maximum(1 - np.asarray(side), 0) for side in accuracies)
    with_trick, without = (max(float(errors.mean()), least / 2) for errors in (treated, control))
    relative = control / without - treated / with_trick  # whose mean's deviation is that of the logarithm's, to first order
    spread = max(float(relative.std(ddof=1)), least / without)
    effect = paired(*accuracies, resolution=least)
    return OnWorkload(math.log(without / with_trick), spread / len(seeds) ** 0.5, effect)

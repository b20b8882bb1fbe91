"""`knep verify`: measures a card again with seeds that it has not seen, and fails where it no longer holds.

A card holds where the fresh difference has the sign of its verdict, and its interval meets the card's.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from knep.config.catalog import GROUPS, cells
from knep.errors import InputError
from knep.evidence import effects
from knep.evidence.arguments import settings, take
from knep.evidence.arms import Arm
from knep.evidence.stats import LEVEL, Effect, interval, paired
from knep.evidence.study import QUIET
from knep.evidence.trials import Store, plan, run_trials

RUNS = 10  # fresh seeds of the option, and of its control
_QUICK = 60.0  # processor seconds that a card of the day may take: two are measured


def power(effect: Mapping[str, float], runs: int = RUNS) -> float:
    """How likely `knep verify` fails where a verdict's effect is gone, 0 to 1: what the check is worth.

    effect: an `Effect` as plain data. Fresh differences are taken to scatter around 0 as the card's do around their
    mean, by a normal law.
    """
    n, half = int(effect["n"]), (effect["high"] - effect["low"]) / 2
    spread = half * n**0.5 / float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    error = spread / runs**0.5
    nearest = min(abs(effect["low"]), abs(effect["high"]))  # the end of the card's interval at the side of 0
    least = max(0.0, nearest - float(stats.t.ppf((1 + LEVEL) / 2, runs - 1)) * error)  # a mean that passes
    return float(stats.norm.cdf(least / error))


def verify(words: Sequence[str]) -> int:
    """`knep verify adamw [seeds=10] [workload=digits/mlp]`, or `knep verify today` for two cards that change daily.

    Returns 1 where a card does not hold, else 0. Raises InputError for a card that is not there.
    """
    if not words:
        raise InputError("give a card, for example knep verify optimizer/adamw, or today for two that change daily")
    given = settings("verify", words[1:], seeds=RUNS)
    workload = take(given.overrides, "workload", "")
    if given.overrides:
        raise InputError(f"{given.overrides[0]}: verify takes seeds, processes and workload")
    chosen = today(datetime.date.today()) if words[0] == "today" else [find(words[0], workload)]
    held = [_holds(slot, cell, given.seeds, given.processes) for slot, cell in chosen]
    return 0 if all(held) else 1


def measured() -> list[tuple[str, dict[str, Any]]]:
    """(slot, cell) of everything that the ledger has a number of, in a fixed order."""
    found = [(slot, cell) for slot in sorted(GROUPS) for cell in cells(slot) if "test_acc" in cell]
    return sorted(found, key=lambda pair: (pair[0], pair[1]["option"], pair[1]["workload"]))


def find(name: str, workload: str = "") -> tuple[str, dict[str, Any]]:
    """The card of "adamw" or "optimizer/adamw", on its first workload or the one given. Raises InputError."""
    slot, _, option = name.rpartition("/")
    found = [(s, c) for s, c in measured() if c["option"] == option and slot in ("", s)]
    slots = sorted({s for s, _ in found})
    if not found:
        raise InputError(f"there is no measured card {name}: docs/cards/README.md lists them")
    if len(slots) > 1:
        raise InputError(f"{name} is an option of several slots: write {' or '.join(f'{s}/{option}' for s in slots)}")
    on = [(s, c) for s, c in found if workload in ("", c["workload"])]
    if not on:
        known = ", ".join(c["workload"] for _, c in found)
        raise InputError(f"workload={workload}: {name} was not measured there, write one of {known}")
    return on[0]


def today(date: datetime.date) -> list[tuple[str, dict[str, Any]]]:
    """Two cards that differ from those of yesterday, among those that are cheap to measure and did not fail."""
    known = measured()
    seconds = {(s, c["option"], c["workload"]): c["cpu_seconds"] for s, c in known}

    def cost(slot: str, cell: Mapping[str, Any]) -> float:
        return RUNS * (cell["cpu_seconds"] + seconds.get((slot, cell["control"], cell["workload"]), 0.0))

    short = [(s, c) for s, c in known if cost(s, c) <= _QUICK and not c["reasons"]]
    if len(short) < 2:
        raise InputError("there are no two measured cards: knep ledger measures them")
    first = 2 * date.toordinal() % len(short)
    return [short[first], short[(first + 1) % len(short)]]


def _holds(slot: str, cell: Mapping[str, Any], runs: int, processes: int) -> bool:
    """Runs the option and its control with fresh seeds, and says whether what the card says of them holds."""
    seeds = range(max(cell["seeds"]) + 1, max(cell["seeds"]) + 1 + runs)
    own, plain = cell["option"], cell["control"]
    base = cell["lines"][:-1]  # the last line is the option itself
    arms = [Arm(o, (*base, f"{slot}={o}")) for o in (own, plain) if o]
    trials = plan(arms, seeds, QUIET)
    with tempfile.TemporaryDirectory() as folder:
        records = run_trials(trials, Store(Path(folder)), processes)
    sides = effects.by_arm(arms, seeds, {(t.arm, t.seed): t.key for t in trials}, records)
    metric = effects.of_classes(cell["classes"])
    accuracies = {name: [effects.tested(r, metric) for r in runs.values()] for name, runs in sides.items()}
    name = f"{slot}/{own} on {cell['workload']}"
    if not plain:
        step = 1 / cell["test_images"]
        now, then = (widened(values, step) for values in (accuracies[own], cell["test_acc"]))
        return _said(f"{name}: test accuracy", now, then, meets(now, then))
    fresh = paired(accuracies[own], accuracies[plain], resolution=1 / cell["test_images"])
    return _difference(f"{name}: difference to {slot}={plain}", fresh, cell["effect"])


def widened(values: Sequence[float], step: float) -> tuple[float, float]:
    """The interval of a mean of values of which none is known better than to `step`."""
    low, high = interval(values)
    return low - step, high + step


def _difference(what: str, fresh: Effect, told: Mapping[str, Any]) -> bool:
    old, said = told["accuracy"], told["verdict"].split(",")[0]
    ranges = (fresh.low, fresh.high), (old["low"], old["high"])
    signs = said not in ("helps", "hurts") or fresh.mean * old["mean"] > 0
    worth = f" (power {power(old, fresh.n):.0%})" if said in ("helps", "hurts") else ""
    return _said(f"{what}, {said}{worth}", *ranges, signs and meets(*ranges))


def meets(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two intervals have a value in common."""
    return a[0] <= b[1] and b[0] <= a[1]


def _said(what: str, fresh: tuple[float, float], old: tuple[float, float], holds: bool) -> bool:
    now, then = (f"{100 * low:.2f} to {100 * high:.2f}" for low, high in (fresh, old))
    print(f"{what}: {now} with fresh seeds, {then} on the card: {'as' if holds else 'NOT as'} its card says")
    return holds

"""`knep verify`: measures a card again with seeds that it has not seen, and fails where its number no longer holds."""

from __future__ import annotations

import datetime
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knep.config.catalog import GROUPS, cells
from knep.errors import InputError
from knep.evidence import effects
from knep.evidence.arguments import settings, take
from knep.evidence.arms import Arm
from knep.evidence.stats import prediction_interval
from knep.evidence.study import QUIET
from knep.evidence.trials import Store, plan, run_trials

RUNS = 2  # of the short version of a card: fresh seeds of the option, and of its control
_LEVEL = 0.999  # a check that runs every day may not cry wolf every twentieth time
_LEAST = 0.005  # half a point: a few seeds of one and the same accuracy do not mean that no other can come
_QUICK = 4.0  # processor seconds of a run that the check of the day may take


def expected(values: Sequence[float], runs: int) -> tuple[float, float]:
    """Where the mean of `runs` further runs should lie, to 99.9 %, and never closer than half a point."""
    centre = statistics.fmean(values)
    low, high = prediction_interval(values, runs, _LEVEL) if len(values) > 1 else (centre, centre)
    return min(low, centre - _LEAST), max(high, centre + _LEAST)


def verify(words: Sequence[str]) -> int:
    """`knep verify adamw [seeds=2] [workload=digits/mlp]`, or `knep verify today` for two cards that change daily.

    Returns 1 where a result leaves its interval, else 0. Raises InputError for a card that is not there.
    """
    if not words:
        raise InputError("give a card, for example knep verify optimizer/adamw, or today for two that change daily")
    given = settings(words[1:], seeds=RUNS)
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
    """Two cards that differ from those of yesterday, among those whose runs are short and did not fail."""
    short = [(s, c) for s, c in measured() if c["cpu_seconds"] <= _QUICK and not c["reasons"]]
    if len(short) < 2:
        raise InputError("there are no two measured cards: knep ledger measures them")
    first = 2 * date.toordinal() % len(short)
    return [short[first], short[(first + 1) % len(short)]]


def _holds(slot: str, cell: Mapping[str, Any], runs: int, processes: int) -> bool:
    """Runs the option and its control with fresh seeds, and says of accuracy and difference whether they hold."""
    seeds = range(max(cell["seeds"]) + 1, max(cell["seeds"]) + 1 + runs)
    own, control = cell["option"], cell["control"]
    base = cell["lines"][:-1]  # the last line is the option itself
    arms = [Arm(o, (*base, f"{slot}={o}")) for o in (own, control) if o]
    trials = plan(arms, seeds, QUIET)
    with tempfile.TemporaryDirectory() as folder:
        records = run_trials(trials, Store(Path(folder)), processes)
    sides = effects.by_arm(arms, seeds, {(t.arm, t.seed): t.key for t in trials}, records)
    accuracies = {name: [effects.accuracy(r, cell["classes"]) for r in runs.values()] for name, runs in sides.items()}
    name = f"{slot}/{own} on {cell['workload']}"
    held = _inside(f"{name}: test accuracy", statistics.fmean(accuracies[own]), expected(cell["test_acc"], runs))
    if not control:
        return held
    old = next(c for s, c in measured() if (s, c["option"], c["workload"]) == (slot, control, cell["workload"]))
    before = [a - b for a, b in zip(cell["test_acc"], old["test_acc"], strict=True)]
    now = statistics.fmean(a - b for a, b in zip(accuracies[own], accuracies[control], strict=True))
    return _inside(f"{name}: difference to {slot}={control}", now, expected(before, runs)) and held


def _inside(what: str, value: float, interval: tuple[float, float]) -> bool:
    low, high = interval
    inside = low <= value <= high
    said = "as its card says" if inside else "NOT as its card says"
    print(f"{what} {100 * value:.2f}, expected {100 * low:.2f} to {100 * high:.2f}: {said}")
    return inside

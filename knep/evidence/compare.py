"""`knep compare`: options of a slot, each tuned with the same budget, then run with fresh seeds, tested once each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knep.config.catalog import GROUPS
from knep.errors import InputError
from knep.evidence import effects, plots, report
from knep.evidence.arguments import Settings, settings, take
from knep.evidence.arms import Arm, choices
from knep.evidence.study import QUIET, classes_of, run
from knep.evidence.trials import Store, composed, plan
from knep.evidence.tuning import Point, edges, search, space

_FACTORS = [1 + i / 20 for i in range(61)]  # of the profile, 1 to 4


def compare(words: Sequence[str]) -> int:
    """`knep compare optimizer=sgd,adam budget=15 seeds=3 [workloads=digits/mlp,digits/cnn] [sampler=qmc] [key=value]`.

    The first option is the one that the others are compared with. Returns 1 where a final run failed, else 0.
    Raises InputError for words that mean no runs.
    """
    given = settings(words, seeds=3)
    sampler = take(given.overrides, "sampler", "qmc")
    asked = take(given.overrides, "workloads", "")
    workloads = [_workload(name) for name in asked.strip("[]").split(",") if name] or [("", ())]
    slot, options = _compared(given)
    folder = given.out or Path("outputs") / "studies" / f"compare_{slot}"
    store, command = Store(folder), f"knep compare {' '.join(words)}"
    parts = {
        name: _tuned(choices(slot, options, (*lines, *given.overrides), options[0]), given, sampler, store)
        for name, lines in workloads
    }
    for name, part in parts.items():
        place = folder / name.replace("/", "_") if name else folder
        title = f"{slot}: {', '.join(options)}" + (f" on {name}" if name else "")
        page = report.write(place, part.found(title, command), part.rows, part.figures())
        report.show(part.rows)
        for said in part.edges:
            print(said)
        print(f"report: {page}")
    _profile({name: part.times() for name, part in parts.items()}, folder)
    return 1 if any(part.failed for part in parts.values()) else 0


def _compared(given: Settings) -> tuple[str, list[str]]:
    """Takes the one group with several options out of the lines. Raises InputError where there is none, or two."""
    several = [line for line in given.overrides if line.partition("=")[0] in GROUPS and "," in line.partition("=")[2]]
    if len(several) != 1:
        raise InputError("compare takes one group with several options, for example knep compare optimizer=sgd,adam")
    given.overrides.remove(several[0])
    slot, _, value = several[0].partition("=")
    return slot, value.split(",")


def _workload(name: str) -> tuple[str, tuple[str, ...]]:
    data, slash, model = name.partition("/")
    if not slash:
        raise InputError(f"workloads={name} is none: write data/model, for example workloads=digits/mlp,digits/cnn")
    return name, (f"data={data}", f"model={model}")


class _Part:
    """One workload: the points that were tried, the final runs at the best of each arm, and what they say."""

    def __init__(self, arms: Sequence[Arm], points: Mapping[str, list[Point]], records: effects.Records, classes: int):
        self.points, self.records, self.classes = points, records, classes
        self.spaces = {arm.name: space(composed(arm)) for arm in arms}
        self.best = {name: best(tried) for name, tried in points.items()}
        self.target = _target(records)
        self.rows = effects.table(arms, records, classes, self.target)
        self.failed = [name for name, by_seed in records.items() if any(map(effects.failed, by_seed.values()))]
        self.edges = [f"{n}: {said}" for n, point in self.best.items() for said in edges(point, self.spaces[n])]

    def found(self, title: str, command: str) -> dict[str, Any]:
        tried = {name: [{**dict(p.values), "val_acc": p.acc} for p in points] for name, points in self.points.items()}
        more = {"points": tried, "best": {n: dict(p.values) for n, p in self.best.items()}, "edges": self.edges}
        return report.results(title, command, self.rows, self.records, self.classes, self.target, more)

    def figures(self) -> dict[str, Any]:
        return {
            "Effects": plots.effects(self.rows),
            "Validation accuracy against each parameter": plots.isolation(self.points, self.spaces),
            "Learning curves at the best point": plots.curves(self.records),
            "Accuracy against cost": plots.cost(self.records, self.classes),
        }

    def times(self) -> dict[str, float]:
        """Processor seconds of each arm to the target, median over seeds; infinite where most never reach it."""
        return {
            name: statistics.median(_seconds_to(r, self.target) for r in by_seed.values())
            for name, by_seed in self.records.items()
        }


def _tuned(arms: Sequence[Arm], given: Settings, sampler: str, store: Store) -> _Part:
    """Searches, then runs the best point of each arm with the seeds 1 ... seeds; the search had seed 0."""
    points = search(arms, given.budget, sampler, lambda trials: run(trials, store, given.processes))
    tuned = [
        Arm(a.name, (*a.overrides, *best(points[a.name]).lines()), a.control, a.slot, a.option, a.kind) for a in arms
    ]
    seeds = range(1, given.seeds + 1)
    trials = plan(tuned, seeds, QUIET)
    records = run(trials, store, given.processes)
    sides = effects.by_arm(tuned, seeds, {(t.arm, t.seed): t.key for t in trials}, records)
    refused = effects.refused(sides)
    if refused:
        raise InputError("; ".join(f"{name} is refused: {reason}" for name, reason in refused.items()))
    return _Part(arms, points, sides, classes_of(records.values(), trials[0].made.config))


def best(points: Sequence[Point]) -> Point:
    """The point of the highest validation accuracy, the first of several."""
    return max(points, key=lambda p: p.acc)


def _target(records: effects.Records) -> float | None:
    """The median over the arms of their best validation accuracy, each the mean of its seeds."""
    means = [
        statistics.fmean(max((p["val/acc"] for p in r.get("curve", ())), default=0.0) for r in by_seed.values())
        for by_seed in records.values()
    ]
    return statistics.median(means) or None


def _seconds_to(record: Mapping[str, Any], target: float | None) -> float:
    """Processor seconds until the target, in proportion to the steps."""
    if target is None or not record.get("curve"):
        return float("inf")
    steps, reached = effects.steps_to(record, target)
    return record["cpu_seconds"] * steps / record["curve"][-1]["step"] if reached else float("inf")


def profile(times: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """arm -> share of workloads that it solves within each factor 1 ... 4 of the fastest arm (Dahl et al. 2023).

    times: workload -> arm -> time to the target, infinite where it never gets there.
    """
    shares: dict[str, list[float]] = {}
    for arm in next(iter(times.values())):
        ratios = [on[arm] / min(on.values()) if on[arm] < float("inf") else float("inf") for on in times.values()]
        shares[arm] = [sum(ratio <= factor for ratio in ratios) / len(ratios) for factor in _FACTORS]
    return shares


def _profile(times: Mapping[str, Mapping[str, float]], folder: Path) -> None:
    """Prints the share of workloads solved within 1, 1.5, 2 and 4 times the fastest, and draws it."""
    shares = profile(times)
    print(
        f"share of {len(times)} workloads solved within a factor of the fastest arm, by processor time to the target:"
    )
    for arm, values in shares.items():
        said = ", ".join(f"{factor:g}: {values[_FACTORS.index(factor)]:.0%}" for factor in (1, 1.5, 2, 4))
        print(f"  {arm}: {said}")
    folder.mkdir(parents=True, exist_ok=True)
    plots.profile(_FACTORS, shares).savefig(folder / "profile.svg")

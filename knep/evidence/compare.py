"""`knep compare`: options of a slot, each tuned with the same budget, then run with fresh seeds, tested once each.

Tuned: `budget` points, each with three seeds; the one of the lowest mean validation loss wins.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from knep.config.catalog import GROUPS
from knep.errors import InputError
from knep.evidence import effects, plots, report
from knep.evidence.arguments import Settings, settings, take
from knep.evidence.arms import Arm, choices
from knep.evidence.study import QUIET, Whole, compared_by, foreseen, run
from knep.evidence.trials import Store, composed, plan
from knep.evidence.tuning import SEEDS, Point, edges, search, space

_FACTORS = [1 + i / 20 for i in range(61)]  # of the profile, 1 to 4


def compare(words: Sequence[str]) -> int:
    """`knep compare optimizer=sgd,adam budget=15 seeds=5 [workloads=digits/mlp,digits/cnn] [sampler=qmc] [key=value]`.

    The first option is the one that the others are compared with. Returns 1 where a final run failed, else 0.
    Raises InputError for words that mean no runs.
    """
    given = settings("compare", words)
    sampler = take(given.overrides, "sampler", "qmc")
    asked = take(given.overrides, "workloads", "")
    workloads = [_workload(name) for name in asked.strip("[]").split(",") if name] or [("", ())]
    slot, options = _compared(given)
    folder = given.out or Path("outputs") / "studies" / f"compare_{slot}"
    store, command = Store(folder), f"knep compare {' '.join(words)}"
    arms = {name: choices(slot, options, (*lines, *given.overrides), options[0]) for name, lines in workloads}
    one = len(options) * (given.budget * len(SEEDS) + given.seeds)
    print(
        f"{len(options)} options, {given.budget} points each with {len(SEEDS)} seeds, then {given.seeds} fresh seeds "
        f"of the best: {one} runs" + (f" on each of {len(workloads)} workloads" if len(workloads) > 1 else "")
    )
    print(foreseen([composed(some[0]) for some in arms.values()], one, given.processes), flush=True)
    whole = Whole(one * len(workloads))
    parts = {name: _tuned(some, given, sampler, store, whole) for name, some in arms.items()}
    for name, part in parts.items():
        place = folder / name.replace("/", "_") if name else folder
        title = f"{slot}: {', '.join(options)}" + (f" on {name}" if name else "")
        page = report.write(place, part.found(title, command), part.rows, part.figures(), part.metric)
        report.show(part.rows, part.metric)
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

    def __init__(
        self,
        arms: Sequence[Arm],
        points: Mapping[str, list[Point]],
        records: effects.Records,
        metric: effects.Metric,
    ) -> None:
        self.points, self.records, self.metric = points, records, metric
        self.spaces = {arm.name: space(composed(arm)) for arm in arms}
        self.best = {name: best(tried) for name, tried in points.items()}
        self.target = _target(records, metric)
        self.rows = effects.table(arms, records, metric, self.target)
        self.failed = [name for name, by_seed in records.items() if any(map(effects.failed, by_seed.values()))]
        self.edges = [f"{n}: {said}" for n, point in self.best.items() for said in edges(point, self.spaces[n])]

    def found(self, title: str, command: str) -> dict[str, Any]:
        tried = {
            name: [{**dict(p.values), "val_loss": _plain(p.value)} for p in ps] for name, ps in self.points.items()
        }
        more = {
            "points": tried,
            "seeds_of_a_point": list(SEEDS),
            "best": {n: dict(p.values) for n, p in self.best.items()},
            "edges": self.edges,
        }
        return report.results(title, command, self.rows, self.records, self.metric, self.target, more)

    def figures(self) -> dict[str, Any]:
        return {
            "Effects": plots.effects(self.rows, self.metric),
            f"Mean validation loss of {len(SEEDS)} seeds against each parameter": plots.isolation(
                self.points, self.spaces
            ),
            "Learning curves at the best point": plots.curves(self.records, self.metric),
            f"{self.metric.said.capitalize()} against cost": plots.cost(self.records, self.metric),
        }

    def times(self) -> dict[str, float]:
        """Processor seconds of each arm to the target, median over seeds; infinite where most never reach it."""
        return {
            name: statistics.median(_seconds_to(r, self.target, self.metric) for r in by_seed.values())
            for name, by_seed in self.records.items()
        }


def _tuned(arms: Sequence[Arm], given: Settings, sampler: str, store: Store, whole: Whole) -> _Part:
    """Searches, then runs the best point of each arm with seeds that the search did not have."""
    points = search(arms, given.budget, sampler, lambda trials: run(trials, store, given.processes, whole))
    tuned = [replace(arm, overrides=(*arm.overrides, *best(points[arm.name]).lines())) for arm in arms]
    seeds = range(len(SEEDS), len(SEEDS) + given.seeds)
    trials = plan(tuned, seeds, QUIET)
    records = run(trials, store, given.processes, whole)
    sides = effects.by_arm(tuned, seeds, {(t.arm, t.seed): t.key for t in trials}, records)
    refused = effects.refused(sides)
    if refused:
        raise InputError("; ".join(f"{name} is refused: {reason}" for name, reason in refused.items()))
    return _Part(arms, points, sides, compared_by(records.values(), trials[0].made.config))


def best(points: Sequence[Point]) -> Point:
    """The point of the lowest mean validation loss, the first of several."""
    return min(points, key=lambda point: point.value)


def _target(records: effects.Records, metric: effects.Metric) -> float | None:
    """The median over the arms of their best validation metric, each the mean of its seeds."""
    means = [
        statistics.fmean(metric.best(p[f"val/{metric.name}"] for p in r.get("curve", ())) for r in by_seed.values())
        for by_seed in records.values()
    ]
    middle = statistics.median(means)
    return middle if middle and math.isfinite(middle) else None


def _plain(value: float) -> float | None:
    """None for what JSON has no word for: the value of a point that failed."""
    return value if math.isfinite(value) else None


def _seconds_to(record: Mapping[str, Any], target: float | None, metric: effects.Metric) -> float:
    """Processor seconds until the target, in proportion to the steps."""
    if target is None or not record.get("curve"):
        return float("inf")
    return record["cpu_seconds"] * effects.steps_to(record, target, metric) / record["curve"][-1]["step"]


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

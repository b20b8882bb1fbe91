"""From a study's records to its table: the paired effect of each arm on its metric and on speed, and its cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from knep.config.schema import RunConfig
from knep.errors import InputError
from knep.evidence.arms import Arm
from knep.evidence.stats import Effect, holm, paired, verdict
from knep.utils.monitors import OF_TASK

Records = Mapping[str, Mapping[int, Mapping[str, Any]]]  # arm -> seed -> record


@dataclass(frozen=True)
class Metric:
    """What runs are compared by.

    name: of a metric of `OF_TASK`, without a split; mode: "max" or "min", which of two values is better; failed: the
    value with which a trial counts that left no network.
    """

    name: str = "acc"
    mode: str = "max"
    failed: float = 0.0

    @property
    def said(self) -> str:
        """Its name in a sentence."""
        return "accuracy" if self.name == "acc" else self.name

    @property
    def scale(self) -> float:
        """100 for a share of 1, which is told in points; 1 for a number in a unit of its own, such as an error."""
        return 100.0 if self.mode == "max" else 1.0

    @property
    def worst(self) -> float:
        """No run reaches a worse one."""
        return 0.0 if self.mode == "max" else math.inf

    @property
    def unit(self) -> str:
        """What stands behind its name: points of 100, or which way is better."""
        return "points" if self.mode == "max" else "lower is better"

    def best(self, values: Iterable[float]) -> float:
        return max(values, default=0.0) if self.mode == "max" else min(values, default=math.inf)

    def reaches(self, value: float, target: float) -> bool:
        """Whether a value is at least as good."""
        return value >= target if self.mode == "max" else value <= target

    def text(self, value: float, signed: bool = False) -> str:
        """A value, or a difference of two, as tables have it."""
        sign = "+" if signed else ""
        return f"{self.scale * value:{sign}.2f}" if self.mode == "max" else f"{value:{sign}.4g}"

    def check_target(self, target: float | None) -> None:
        """Raises InputError for a target that no run can have."""
        if target is not None and self.mode == "max" and not target < 1:
            raise InputError(
                f"target={target:g} is no validation {self.said}: write a share between 0 and 1, for example 0.93"
            )


def of_classes(count: int) -> Metric:
    """Accuracy; what failed counts with that of guessing, so that no failure makes an arm look better."""
    return Metric(failed=1 / count)


def metric_of(config: Mapping[str, Any]) -> Metric:
    """By what the runs of a config are compared. Raises InputError for a task of somebody's own."""
    name = RunConfig.of(config).task_name
    if name not in OF_TASK:
        raise InputError(
            f"task={name} is none of knep's, whose metrics trials compare: write one of {', '.join(OF_TASK)}"
        )
    return Metric(OF_TASK[name].primary, OF_TASK[name].mode)


def with_failures(metric: Metric, records: Iterable[Mapping[str, Any]]) -> Metric:
    """The metric with the worst value of all trials that ended, with which those count that failed.

    Raises InputError where none ended.
    """
    key = f"test/{metric.name}"
    ended = [float(r[key]) for r in records if r.get(key) is not None and not failed(r)]
    if not ended:
        raise InputError(f"no trial ended with a {key}: look at one by itself, with knep train and the same lines")
    return replace(metric, failed=min(ended) if metric.mode == "max" else max(ended))


@dataclass(frozen=True)
class Row:
    """What one arm shows of its trick.

    effect: on the metric of the test split, in its own unit (a share of 1 for accuracy); positive means that the trick
    raises it. steps: the effect on optimizer steps to the target, negative means sooner; None where a run of either
    side never arrives, for it has no step at which it does (unreached, control_unreached: how many), or has no target.
    time, memory: arm with the trick over arm without it, medians (processor time and peak memory of the process).
    failed: of the n trials with the trick, how many ended without a network; they count with `Metric.failed`.
    """

    arm: str
    slot: str
    option: str
    kind: str
    effect: Effect
    corrected_p: float
    steps: Effect | None
    unreached: int
    control_unreached: int
    time: float
    memory: float
    failed: int
    n: int
    verdict: str


def by_arm(arms: Sequence[Arm], seeds: Sequence[int], keys: Mapping[tuple[str, int], str], records: Any) -> Records:
    """arm -> seed -> record, from records by key; two arms that mean the same run share a record."""
    return {arm.name: {s: records[keys[arm.name, s]] for s in seeds} for arm in arms}


def tested(record: Mapping[str, Any], metric: Metric) -> float:
    """What a trial reached on the test split; what a failure counts with where it failed."""
    return metric.failed if failed(record) else float(record[f"test/{metric.name}"])


def failed(record: Mapping[str, Any]) -> bool:
    """Whether a trial left no network: an error, a kill, a loss that is no number."""
    return record["status"] in ("failed", "interrupted")


def refused(records: Records) -> dict[str, str]:
    """arm -> reason, for the arms whose trick cannot be done to their model."""
    ends = ((name, record) for name, by_seed in records.items() for record in by_seed.values())
    return {name: record["reason"] for name, record in ends if record["status"] == "refused"}


def default_target(arms: Sequence[Arm], records: Records, metric: Metric) -> float | None:
    """1 % below the worst mean of the best validation metric among the arms that others are compared with.

    Above it, where low is good. The mean itself lies between two accuracies that a small validation split can have, and
    many a run just misses it.
    """
    key = f"val/{metric.name}"
    controls = {arm.control for arm in arms if arm.control in records}
    means = [
        statistics.fmean(metric.best(p[key] for p in r["curve"]) for r in records[name].values())
        for name in controls
        if all(r.get("curve") for r in records[name].values())
    ]
    if not means:
        return None
    return 0.99 * min(means) if metric.mode == "max" else 1.01 * max(means)


def steps_to(record: Mapping[str, Any], target: float, metric: Metric) -> float:
    """Optimizer steps until the validation metric reached the target; infinite where it never did."""
    key = f"val/{metric.name}"
    return next((p["step"] for p in record.get("curve") or () if metric.reaches(p[key], target)), math.inf)


def table(arms: Sequence[Arm], records: Records, metric: Metric, target: float | None) -> list[Row]:
    """One row for each arm with a control, the largest effect first; p-values corrected over all rows (Holm).

    Arms that are not in `records`, such as refused ones, have no row. Raises ValueError for fewer than two seeds.
    """
    compared = [arm for arm in arms if arm.name in records and arm.control in records]
    effects = [_effect(arm, records, metric) for arm in compared]
    corrected = holm([e.p for e in effects])
    rows = [_row(a, e, p, records, metric, target) for a, e, p in zip(compared, effects, corrected, strict=True)]
    return sorted(rows, key=lambda row: -abs(row.effect.mean))


def _sides(arm: Arm, records: Records) -> tuple[Mapping[int, Any], Mapping[int, Any]]:
    """The records with the trick, and those without it."""
    own, control = records[arm.name], records[arm.control]
    return (own, control) if arm.sign > 0 else (control, own)


def _effect(arm: Arm, records: Records, metric: Metric) -> Effect:
    having, lacking = _sides(arm, records)
    treated, control = ([tested(side[s], metric) for s in having] for side in (having, lacking))
    images = test_images([*having.values(), *lacking.values()]) if metric.name == "acc" else None
    return paired(treated, control, resolution=1 / images if images else None)


def test_images(records: Iterable[Mapping[str, Any]]) -> int | None:
    """Number of test images, as any trial that ended says; None where none does."""
    told = (str(r["test/right"]).partition(":")[0] for r in records if r.get("test/right"))
    return next(map(int, told), None)


def _row(arm: Arm, effect: Effect, p: float, records: Records, metric: Metric, target: float | None) -> Row:
    having, lacking = _sides(arm, records)
    broken = sum(failed(r) for r in having.values())
    steps, never = None, (0, 0)
    if target is not None:
        own, other = ([steps_to(side[s], target, metric) for s in having] for side in (having, lacking))
        never = (own.count(math.inf), other.count(math.inf))
        steps = None if any(never) else paired(own, other)
    said = verdict(effect, p, mode=metric.mode)
    return Row(
        arm=arm.name,
        slot=arm.slot,
        option=arm.option,
        kind=arm.kind,
        effect=effect,
        corrected_p=p,
        steps=steps,
        unreached=never[0],
        control_unreached=never[1],
        time=_ratio(having, lacking, "cpu_seconds"),
        memory=_ratio(having, lacking, "peak_mib"),
        failed=broken,
        n=effect.n,
        verdict=f"{said}, {broken} of {effect.n} failed" if broken else said,
    )


def _ratio(having: Mapping[int, Any], lacking: Mapping[int, Any], key: str) -> float:
    above, below = (median(side, key) for side in (having, lacking))
    return above / below if below else float("nan")


def median(by_seed: Mapping[int, Any], key: str) -> float:
    """The median of a number over the seeds that have it; NaN where none has, as where all were killed."""
    values = [r[key] for r in by_seed.values() if key in r]
    return statistics.median(values) if values else float("nan")


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data, for JSON and CSV."""
    return [asdict(row) for row in rows]

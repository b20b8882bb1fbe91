"""From the records of a study to its table: the paired effect of each arm on accuracy and speed, and what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from knep.evidence.arms import Arm
from knep.evidence.stats import Effect, holm, paired, verdict

Records = Mapping[str, Mapping[int, Mapping[str, Any]]]  # arm -> seed -> record


@dataclass(frozen=True)
class Row:
    """What one arm shows of its trick. Accuracy in 0..1; positive means that the trick raises it.

    steps: the effect on optimizer steps to the target, negative means sooner; None without a target or curves.
    time, memory: arm with the trick over arm without it, medians (processor time and peak memory of the process).
    failed: of the n trials with the trick, how many ended without a network; they count with the accuracy of guessing.
    """

    arm: str
    slot: str
    option: str
    kind: str
    accuracy: Effect
    corrected_p: float
    steps: Effect | None
    unreached: int
    time: float
    memory: float
    failed: int
    n: int
    verdict: str


def by_arm(arms: Sequence[Arm], seeds: Sequence[int], keys: Mapping[tuple[str, int], str], records: Any) -> Records:
    """arm -> seed -> record, from records by key; two arms that mean the same run share a record."""
    return {arm.name: {s: records[keys[arm.name, s]] for s in seeds} for arm in arms}


def accuracy(record: Mapping[str, Any], classes: int) -> float:
    """Test accuracy of a trial; that of guessing where it failed, so that no failure makes an arm look better."""
    return 1 / classes if failed(record) else float(record["test/acc"])


def failed(record: Mapping[str, Any]) -> bool:
    """Whether a trial left no network: an error, a kill, a loss that is no number."""
    return record["status"] in ("failed", "interrupted")


def refused(records: Records) -> dict[str, str]:
    """arm -> reason, for the arms whose trick cannot be done to their model."""
    ends = ((name, record) for name, by_seed in records.items() for record in by_seed.values())
    return {name: record["reason"] for name, record in ends if record["status"] == "refused"}


def default_target(arms: Sequence[Arm], records: Records) -> float | None:
    """99 % of the lowest mean of the best validation accuracy among the arms that others are compared with.

    The mean itself lies between two accuracies that a small validation split can have, and many a run just misses it.
    """
    controls = {arm.control for arm in arms if arm.control}
    means = [
        statistics.fmean(max(p["val/acc"] for p in r["curve"]) for r in records[name].values())
        for name in controls
        if all(r.get("curve") for r in records[name].values())
    ]
    return 0.99 * min(means) if means else None


def steps_to(record: Mapping[str, Any], target: float) -> tuple[float, bool]:
    """Optimizer steps until the validation accuracy reached the target, and whether it did; otherwise all its steps."""
    curve = record.get("curve") or [{"step": float("nan"), "val/acc": 0.0}]
    for point in curve:
        if point["val/acc"] >= target:
            return point["step"], True
    return curve[-1]["step"], False


def table(arms: Sequence[Arm], records: Records, classes: int, target: float | None) -> list[Row]:
    """One row for each arm with a control, the largest effect first; p-values corrected over all rows (Holm).

    Arms that are not in `records`, such as refused ones, have no row. Raises ValueError for fewer than two seeds.
    """
    compared = [arm for arm in arms if arm.name in records and arm.control in records]
    effects = [_effect(arm, records, classes) for arm in compared]
    corrected = holm([e.p for e in effects])
    rows = [_row(a, e, p, records, target) for a, e, p in zip(compared, effects, corrected, strict=True)]
    return sorted(rows, key=lambda row: -abs(row.accuracy.mean))


def _sides(arm: Arm, records: Records) -> tuple[Mapping[int, Any], Mapping[int, Any]]:
    """The records with the trick, and those without it."""
    own, control = records[arm.name], records[arm.control]
    return (own, control) if arm.sign > 0 else (control, own)


def _effect(arm: Arm, records: Records, classes: int) -> Effect:
    having, lacking = _sides(arm, records)
    return paired([accuracy(having[s], classes) for s in having], [accuracy(lacking[s], classes) for s in having])


def _row(arm: Arm, effect: Effect, p: float, records: Records, target: float | None) -> Row:
    having, lacking = _sides(arm, records)
    broken = sum(failed(r) for r in having.values())
    steps, unreached = None, 0
    if target is not None:
        taken = [(steps_to(having[s], target), steps_to(lacking[s], target)) for s in having]
        unreached = sum(not a[1] for a, _ in taken)
        if all(a[0] == a[0] and b[0] == b[0] for a, b in taken):
            steps = paired([a[0] for a, _ in taken], [b[0] for _, b in taken])
    said = verdict(effect, p)
    return Row(
        arm=arm.name,
        slot=arm.slot,
        option=arm.option,
        kind=arm.kind,
        accuracy=effect,
        corrected_p=p,
        steps=steps,
        unreached=unreached,
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

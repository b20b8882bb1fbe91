"""Trials of lines with a seed, each paid from the budget before it starts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from knep.config.catalog import cells
from knep.config.compose import Composed
from knep.doctor.cure.candidates import Way, key_of, merged
from knep.errors import InputError
from knep.evidence.arms import Arm
from knep.evidence.auto.budget import Cost, Purse
from knep.evidence.effects import Metric, failed
from knep.evidence.trials import Trial, plan

QUIET = ("progress=false",)
_MARGIN = 1.15  # what a trial may take more than foreseen, where the clock is the budget
_UNKNOWN = 1.3  # the same, as a share of the plain line's, of a trick that the ledger has not timed

Run = Callable[[Trial], Mapping[str, Any]]


class Over(Exception):
    """The budget has no room for a trial that was wanted."""


class Refused(Exception):
    """A trick cannot be done to this run; the reason."""


@dataclass(frozen=True)
class Seen:
    """What a trial reached on the validation split: the task's metric, and the loss between two that are equal."""

    value: float
    loss: float


@dataclass
class Bench:
    """Where lines are tried.

    run: trains one trial and gives its record; made: the plain line, composed; total: optimizer steps of a whole run;
    parts: its epochs, or its steps where the lines count those; length: the share of it that the longest trials have;
    reserve: what the last word will cost, in the budget's unit, which the search may not touch; pace: seconds of a
    step, as trials so far tell. records: of the trials that read the test split, by lines and seed.
    """

    purse: Purse
    metric: Metric
    run: Run
    made: Composed
    total: int
    parts: int = 1
    length: float = 1.0
    reserve: float = 0.0
    pace: float = 0.0
    records: dict[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    _seen: dict[tuple[Way, int, float, bool], Seen] = field(default_factory=dict)
    _paces: list[float] = field(default_factory=list)
    _whole: bool = False

    def cost(self, lines: Way, share: float = 1.0) -> Cost:
        """What a trial should cost. share: of the longest one's length."""
        runs = self._part(share)
        steps = self.total * runs
        return Cost(steps, runs, steps * self.pace * slower(lines) * _MARGIN)

    def _part(self, share: float) -> float:
        """Of a whole run, in epochs that are whole."""
        return max(1, round(share * self.length * self.parts)) / self.parts

    def see(self, lines: Way, seed: int, share: float = 1.0, tested: bool = False, final: bool = False) -> Seen:
        """Trains once, or remembers. final: may spend the reserve.

        Raises Over where there is no room, Refused where the lines contradict each other or the model.
        """
        key = (lines, seed, share, tested)
        if key in self._seen:
            return self._seen[key]
        trial = self.trial(lines, seed, share, tested)
        unit = self.purse.budget.unit
        wanted = self.cost(lines, share)
        if wanted.of(unit) > self.purse.left - (0.0 if final else self.reserve):
            raise Over
        before = self.purse.clock()
        record = self.run(trial)
        took = self.purse.clock() - before
        if record["status"] == "refused":
            raise Refused(record["reason"])
        if record["status"] == "interrupted":
            raise KeyboardInterrupt
        steps = float(record.get("steps") or wanted.steps)
        self.purse.pay(Cost(steps, wanted.runs))
        self._paced(took / max(1.0, wanted.steps) / slower(lines), share)
        self._seen[key] = seen = self._read(record)
        if tested:
            self.records[" ".join(lines), str(seed)] = record
        return seen

    def signed(self, lines: Way, seeds: Sequence[int], share: float = 1.0, **how: bool) -> list[float]:
        """What lines reach with each seed, higher is better; how: as for `see`. Raises as that does."""
        sign = 1 if self.metric.mode == "max" else -1
        return [sign * self.see(lines, seed, share, **how).value for seed in seeds]

    def trial(self, lines: Way, seed: int, share: float, tested: bool) -> Trial:
        """Raises Refused."""
        try:
            shorter = () if share == math.inf else shortened(self.made, self._part(share))
            (trial,) = plan([Arm(" ".join(lines), merged(lines, shorter))], [seed], QUIET)
        except InputError as error:
            raise Refused(" ".join(str(error).split())) from error
        return replace(trial, tested=tested)

    def _paced(self, pace: float, share: float) -> None:
        """Of trials of whole length once there is one: a short one is mostly its start."""
        if share == 1.0 and not self._whole:
            self._whole = True
            self._paces.clear()
        if share == 1.0 or not self._whole:
            self._paces.append(pace)
        self.pace = statistics.median(self._paces)

    def _read(self, record: Mapping[str, Any]) -> Seen:
        value, loss = (record.get(f"val/{name}") for name in (self.metric.name, "loss"))
        if failed(record) or value is None or not math.isfinite(value):
            return Seen(-math.inf if self.metric.mode == "max" else math.inf, math.inf)
        return Seen(float(value), math.inf if loss is None else float(loss))

    def gain(self, lines: Way, control: Way, seed: int, share: float = 1.0) -> tuple[float, float]:
        """What lines have more than the control with one seed, above 0 where they are better: by metric, and by loss.

        A trial that failed loses against all, also against another one that failed.
        """
        plain = self.see(control, seed, share)
        mine = self.see(lines, seed, share)
        if not math.isfinite(mine.value):
            return -math.inf, -math.inf
        if not math.isfinite(plain.value):
            return math.inf, math.inf
        sign = 1 if self.metric.mode == "max" else -1
        return sign * (mine.value - plain.value), plain.loss - mine.loss


def shortened(made: Composed, share: float) -> Way:
    """The lines that give a run this share of its length, whole epochs where it has some; () for all of it."""
    trainer = made.config["trainer"]
    if share >= 1:
        return ()
    if trainer["max_steps"] and trainer["max_steps"] > 0:
        return (f"trainer.max_steps={max(1, round(share * trainer['max_steps']))}",)
    return (f"trainer.max_epochs={max(1, round(share * trainer['max_epochs']))}",)


def slower(lines: Sequence[str]) -> float:
    """How many times the plain line's time these take, by the ledger's medians; 1.3 for each that it does not know."""
    factor = 1.0
    for line in lines:
        slot, _, option = line.partition("=")
        if key_of(line) == slot and "." not in slot:
            factor *= _times(slot, option)
    return factor


@lru_cache(maxsize=1024)
def _times(slot: str, option: str) -> float:
    if option in ("none", "default"):
        return 1.0
    rows = [cell for cell in cells(slot) if "cpu_seconds" in cell]
    if not rows:
        return 1.0  # data, model and what else is no trick
    against = {
        c["workload"]: c["cpu_seconds"] for c in rows if c["option"] == ("adamw" if slot == "optimizer" else "none")
    }
    ratios = [
        c["cpu_seconds"] / against[c["workload"]] for c in rows if c["option"] == option and c["workload"] in against
    ]
    return max(1.0, statistics.median(ratios)) if ratios else _UNKNOWN

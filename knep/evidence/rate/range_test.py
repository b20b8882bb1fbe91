"""The range test: the loss over a rate that rises from step to step (Smith 2017, sec. 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from knep.config.instantiate import allow
from knep.evidence.rate.short_run import Problem
from knep.tasks.base import Batch

STEPS = 100
DOWN, UP = 1e-4, 1e3  # shares of the default rate between which it is tried
_SMOOTH = 0.9  # decay of the running mean of the loss
_RISING = "knep.optim.schedules.rising"  # no option: a run cannot choose it
_NO_AVERAGING = {"_target_": "knep.recipes.averaging.none"}
_DIVERGED = 4.0  # times the least loss so far, above what the start had


@dataclass(frozen=True)
class Curve:
    """A range test of one seed. rates: tried, rising; losses: of the batches, as many, the last may be no number."""

    rates: Sequence[float]
    losses: Sequence[float]

    @property
    def smooth(self) -> list[float]:
        """The running mean of the losses, corrected for its start at 0 (Kingma and Ba 2015, sec. 3)."""
        mean, found = 0.0, []
        for i, loss in enumerate(self.losses, start=1):
            mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
            found.append(mean / (1 - _SMOOTH**i))
        return found

    @property
    def lowest(self) -> float | None:
        """The rate at which the smoothed loss is least; None where it never falls."""
        smooth = [value if math.isfinite(value) else math.inf for value in self.smooth]
        if not smooth or min(smooth) > 0.98 * smooth[0]:
            return None
        return self.rates[smooth.index(min(smooth))]

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls most per decade, before it is least; None where it never falls."""
        lowest = self.lowest
        if lowest is None:
            return None
        smooth = self.smooth
        end = list(self.rates).index(lowest)
        falls = [smooth[i + 5] - smooth[i] for i in range(max(1, end - 5))]
        return self.rates[falls.index(min(falls)) + 2]


class Watcher(Callback):
    """Keeps the loss of each batch, and ends the run where it has left all bounds."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = rates
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        self.losses.append(math.nan if loss is None else float(loss))
        smooth = Curve(self.rates, self.losses).smooth
        least, last = min(smooth), smooth[-1]
        if not math.isfinite(last) or last > smooth[0] + (_DIVERGED - 1) * abs(least):
            trainer.should_stop = True


def range_test(problem: Problem, lowered: Mapping[str, float], default: float, seed: int, steps: int = STEPS) -> Curve:
    """The losses while the rate rises by one factor a step from default * DOWN to default * UP.

    lowered: the optimizer's rates, key path -> value, times DOWN.
    """
    factor = (UP / DOWN) ** (1 / (steps - 1))
    rates = [default * DOWN * factor**i for i in range(steps)]
    watcher = Watcher(rates)
    allow(_RISING)
    rising = {"_target_": _RISING, "_partial_": True, "factor": factor}
    changes = {**lowered, "scheduler": rising, "averaging": _NO_AVERAGING, "trainer.limit_val_batches": 0}
    problem.fit(changes, steps, seed, watcher)
    seen = watcher.losses[:steps]
    return Curve(rates[: len(seen)], seen)

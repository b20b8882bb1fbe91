"""How many micro-batches make an optimizer step, from which epoch on: `accumulate={0: 1, 5: 4}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from knep.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def plan_of(accumulate: object) -> dict[int, int]:
    """First epoch -> micro-batches of a step from there on, of a value of `accumulate`; a number is one from epoch 0.

    Raises InputError for what is neither a whole number from 1 on nor a table of them by epochs from 0 on.
    """
    table = accumulate if isinstance(accumulate, Mapping) else {0: accumulate}
    plan = {_whole(epoch): _whole(count) for epoch, count in table.items()}
    if not plan or any(e is None or e < 0 or n is None or n < 1 for e, n in plan.items()):
        raise InputError(
            f"accumulate={accumulate} must be a whole number of micro-batches, at least 1, or such numbers by the "
            "epoch that they begin in, from 0 on: write accumulate=4, or 'accumulate={0:1,5:4}'"
        )
    whole = {int(e): int(n) for e, n in plan.items() if e is not None and n is not None}
    return dict(sorted(({0: 1} | whole).items()))


def at_epoch(plan: Mapping[int, int], epoch: int) -> int:
    """Micro-batches of a step in an epoch."""
    return plan[max(start for start in plan if start <= epoch)]


def plan_in(trainer: Trainer) -> dict[int, int]:
    """The plan of a fit: of a GradientAccumulationScheduler among its callbacks, or the Trainer's own number."""
    plans = (getattr(callback, "scheduling", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    plan = next((plan for plan in plans if plan), None)
    return {0: trainer.accumulate_grad_batches} if plan is None else {0: 1} | plan


def accumulates(trainer: Trainer) -> bool:
    """Whether some steps of the fit have several micro-batches."""
    return max(plan_in(trainer).values()) > 1


def length_of(trainer: Trainer) -> tuple[float, float]:
    """Optimizer steps and epochs of a fit whose batches are known, the last epoch in part; infinite for no end."""
    steps, batches, plan = trainer.estimated_stepping_batches, trainer.num_training_batches, plan_in(trainer)
    steps = steps if steps > 0 else math.inf
    if batches == math.inf:
        epochs = trainer.max_epochs or -1
        return steps, epochs if epochs > 0 and steps == math.inf else math.inf
    if plan == {0: trainer.accumulate_grad_batches} or steps == math.inf:
        return steps, steps / math.ceil(batches / plan[0])
    # Lightning counts with the number of now.
    most = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
    allowed, done, epoch = trainer.max_steps if trainer.max_steps > 0 else math.inf, 0, 0
    while epoch < most:
        each = -(-int(batches) // at_epoch(plan, epoch))
        if done + each >= allowed:
            return allowed, epoch + (allowed - done) / each
        done, epoch = done + each, epoch + 1
    return done, epoch


def _whole(value: object) -> int | None:
    # Stored configs have their keys as text.
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None

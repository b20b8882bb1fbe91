"""Batches that grow over the run: more micro-batches make a step from some epochs on, at the rate of their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from knep.io.schema import Check, number, record
from knep.optim.batch_law import exponent
from knep.utils.batch_plan import at_epoch, plan_of


class BatchGrowth(GradientAccumulationScheduler):
    """Steps of `plan` (first epoch -> micro-batches), in place of a rate that falls (Smith et al. 2018), or with one
    that grows by the rule of `knep.optim.batch_law`, where `power` is its exponent.

    Both are functions of the epoch alone; what the rates were multiplied by so far is stored, since an optimizer's
    state holds its rates, so that a run which is resumed within an epoch goes on alike.
    """

    def __init__(self, plan: Mapping[int, int], power: float) -> None:
        super().__init__(dict(plan))
        self._plan, self._power, self._times = dict(plan), power, 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"times": self._times}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._times = state_dict["times"]

    @staticmethod
    def state_schema() -> Check:
        """What `state_dict` may hold, for a checkpoint to be checked by before it is loaded."""
        return record({"times": number(1e-12, 1e12)})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that is resumed has no start of its own.
        self._follow(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._follow(trainer)

    def _follow(self, trainer: Trainer) -> None:
        count = at_epoch(self._plan, trainer.current_epoch)
        trainer.accumulate_grad_batches = count
        times = (count / self._plan[0]) ** self._power
        if times != self._times:
            self._scale(trainer, times / self._times)
            self._times = times

    def _scale(self, trainer: Trainer, by: float) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * by
                if "initial_lr" in group:
                    group["initial_lr"] = group["initial_lr"] * by
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [rate * by for rate in scheduler.base_lrs]


def growth(accumulate: object, optimizer: Mapping[str, Any]) -> BatchGrowth | None:
    """Of a recipe's `accumulate` and its optimizer's node; None for a number, and for a table of one number.

    The rate follows the batch where the node has `lr_per`, which says of which batch it is.
    """
    if not isinstance(accumulate, Mapping):
        return None
    plan = plan_of(accumulate)
    if len(set(plan.values())) == 1:
        return None
    return BatchGrowth(plan, exponent(str(optimizer["_target_"])) if optimizer.get("lr_per") is not None else 0.0)

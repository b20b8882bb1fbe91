"""One member of a fit: its model, what it watches, and what came out of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from knep.config.instantiate import instantiate
from knep.config.schema import RunConfig
from knep.data.base import ImageData
from knep.engine.build import build_module, spec_of
from knep.engine.schedule_free import estimate, put_back, statistics
from knep.recipes.averaging import Ema, Swa
from knep.recipes.stopping import stops


class Member:
    """A Classifier built from its config as a single run builds it, with its validation curve.

    curve: a row per validation, {"step", "epoch", "train/loss", "train/acc", "val/loss", "val/acc"}; epochs, steps:
    until it ended; ended: "" while it trains, then "finished", "stopped_early" or "failed" (a loss that is no number).
    """

    def __init__(self, run: RunConfig, data: ImageData) -> None:
        self.run, self.spec = run, spec_of(run, data)
        data.sampling = instantiate(run.sampling) if run.sampling is not None else None
        torch.manual_seed(run.seed)
        self.module = build_module(run, self.spec, data, seed=run.seed)
        self.curve: list[dict[str, float]] = []
        self.ended = ""
        self.epochs = self.steps = 0
        self._monitor, self._mode = run.watched
        self._best: dict[str, Tensor] = {}
        stopping, averaging = self.module.recipe.stopping, self.module.recipe.averaging
        self._stopping = stopping if isinstance(stopping, EarlyStopping) else None
        self._average: Any = averaging if isinstance(averaging, (Ema, Swa)) else None
        # What the callbacks of the averaging slot read of Lightning's Trainer.
        self._stage: Any = SimpleNamespace(
            state=SimpleNamespace(fn="fit"), datamodule=data, max_epochs=run.trainer.max_epochs,
            precision_plugin=None, global_step=0, current_epoch=0, is_last_batch=False,
            accumulate_grad_batches=1, callbacks=[],
        )  # fmt: skip

    def begin(self, steps: int, per_epoch: int) -> None:
        """Before the first step, when the model is on its device; steps: of the optimizer, in all and in an epoch."""
        self._stage.estimated_stepping_batches, self._stage.num_training_batches = steps, per_epoch
        self.module.train()
        if self._average is not None:
            self._average.setup(self._stage, self.module, "fit")
            self._average.on_train_start(self._stage, self.module)

    def after_batch(self, epoch: int, steps: int, last: bool) -> None:
        """After each batch: steps of the optimizer so far; last: of the epoch."""
        if self._average is not None:
            self._stage.global_step, self._stage.current_epoch, self._stage.is_last_batch = steps, epoch, last
            self._average.on_train_batch_end(self._stage, self.module, None, None, 0)

    @torch.no_grad()
    def validate(
        self,
        data: ImageData,
        epoch: int,
        steps: int,
        trained: Sequence[float],
        context: AbstractContextManager,
        averaged: bool,
    ) -> None:
        """Adds a row to the curve, and ends the member where it is to stop.

        trained: since the last validation, the training loss summed over the images, correct answers, images;
        averaged: the weights are an average that the optimizer went to, without batch-norm statistics of its own.
        """
        kept = estimate(self._stage, self.module) if averaged else []
        if self._average is not None:
            self._average.on_validation_epoch_start(self._stage, self.module)
        self.module.eval()
        loss = correct = images = 0.0
        with context:
            for batch in data.val_dataloader():
                x, y = (t.to(self.module.device) for t in batch)
                logits_NK = self.module(x)
                found = self.module.task.evaluated(logits_NK, y)
                loss, correct = loss + found.loss.item(), correct + int(found.correct)
                images += int((y >= 0).sum())
        self.module.train()
        row = {"val/loss": loss / images, "val/acc": correct / images}
        images = max(trained[2], 1)
        row |= {"train/loss": trained[0] / images, "train/acc": trained[1] / images}
        self.curve.append({"step": steps, "epoch": epoch, **row})
        current = self.curve[-1][self._monitor]
        self._keep_best()
        if self._average is not None:
            self._average.on_validation_epoch_end(self._stage, self.module)
        if averaged:
            put_back(statistics(self.module.model), kept)
        if self._stopping is not None and stops(self._stopping, torch.tensor(current)):
            self.end("stopped_early", epoch + 1, steps)

    def _keep_best(self) -> None:
        """The weights that early stopping goes back to; no number counts as the worst, as in Lightning."""
        if self._stopping is None:
            return
        sign = 1 if self._mode == "min" else -1
        values = [sign * row[self._monitor] for row in self.curve]
        numbers = [float("inf") if v != v else v for v in values]
        if len(numbers) == 1 or numbers[-1] < min(numbers[:-1]):
            self._best = copy.deepcopy(self.module.state_dict())

    def end(self, how: str, epochs: int, steps: int) -> None:
        """Training is over for this member, whatever becomes of the others."""
        self.ended, self.epochs, self.steps = how, epochs, steps

    def settle(self, averaged: bool) -> None:
        """After the last step of all: the weights that this member is tested with. averaged: as for `validate`."""
        if averaged:
            estimate(self._stage, self.module)
        if self._average is not None:
            self._average.on_train_end(self._stage, self.module)
        if self._best:
            self.module.load_state_dict(self._best)
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.data = tensor.data.clone()  # no view of what all members share, which a checkpoint would store whole
        self.module.eval().cpu()

    @property
    def best(self) -> dict[str, float]:
        """The row of the best epoch by the metric that is watched, empty without any."""
        sign = 1 if self._mode == "min" else -1
        return min(self.curve, key=lambda row: sign * row[self._monitor], default={})

"""`knep.doctor.callback()`: the doctor beside anybody's LightningModule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.doctor.live.callback import Doctor
from knep.doctor.live.watch import Watch
from knep.engine.any_module.part import network
from knep.engine.module import Classifier
from knep.errors import InputError
from knep.observe.step_observer import fused
from knep.tasks.batches import Reading
from knep.utils.text import shortened

_SHARDS = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")  # no process has whole weights
_LOSSES = ("val/loss", "val_loss", "valid_loss", "loss/val", "validation_loss", "valid/loss")
_ACCURACIES = ("val/acc", "val_acc", "val_accuracy", "val/accuracy", "valid_acc", "acc/val")


class ModuleDoctor(Doctor):
    """As `knep.doctor.callback` says. An error of its own ends the watch, in one line, and never the training."""

    def __init__(self, *, on_finding: str = "warn", every: int = 200) -> None:
        super().__init__(on_finding=on_finding, every=every)
        self._off = False
        self._told = self._batches = 0  # the optimizer's steps that the watch was told of; batches
        self._loses = True  # the loss of a step is that of the watched optimizer
        self._reading = Reading()

    def _guarded(self, trainer: Trainer, act: Callable[[], None]) -> None:
        if self._off:
            return
        try:
            act()
        except Exception as error:
            self._off = True
            text = shortened(f"{type(error).__name__}: {error}", 300)
            self._shut()
            self.say(trainer, f"doctor: the watch ends at step {trainer.global_step}, the training goes on: {text}")

    def _shut(self) -> None:
        with contextlib.suppress(Exception):
            if self._watch is not None:
                self._watch.__exit__()
        self._watch = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Classifier):
            raise InputError("knep.doctor.callback is for modules of your own: knep's runs take callbacks=doctor")
        self._off, self._told, self._batches = False, 0, 0
        self._guarded(trainer, lambda: Doctor.on_train_start(self, trainer, pl_module))

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = type(trainer.strategy).__name__
        has = any(group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups)
        if not has or strategy in _SHARDS:
            why = f"{strategy} shares out the weights" if has else "there is no optimizer with parameters"
            self.say(trainer, f"doctor: nothing is watched: {why}")
            return
        optimizer = trainer.optimizers[0]
        model = part_of(pl_module, optimizer, len(trainer.optimizers))
        self._loses = len(trainer.optimizers) == 1
        if not self._loses:
            name = next((path for path, m in pl_module.named_modules() if m is model), "") or type(pl_module).__name__
            what = f"doctor: of {len(trainer.optimizers)} optimizers the first is watched, and {name} that it trains"
            self.say(trainer, f"{what}; the loss of a step is none of one of them, so its course is not judged")
        elif fused(model):
            self.say(trainer, "doctor: the model is compiled to one graph: what goes on in its layers is not seen")
        self._watch = Watch(model, optimizer, every=self.every, on_finding="none").__enter__()
        assert self._watch.loop is not None
        batches = trainer.num_training_batches
        self._watch.loop.epoch = int(batches // self.window) if batches < 1e9 else 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pass  # the watch sees what the model is given

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        pass  # and its gradients

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._guarded(trainer, lambda: self._one(trainer, pl_module, outputs, batch))
        self._batches += 1
        if self.together and self._batches % self.every == 0:
            self.agree(trainer, pl_module)

    def _one(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any) -> None:
        watch = self._watch
        if watch is None or watch.loop is None or watch.loop.steps == self._told:
            return
        self._told = watch.loop.steps
        if outputs is None and pl_module.automatic_optimization:  # a batch that training_step left out
            watch.loop.skipped()
        self.window = trainer.accumulate_grad_batches  # another one in a later epoch, where batches grow
        loss = loss_of(outputs) if self._loses else None
        if loss is not None and pl_module.automatic_optimization and self.window > 1:
            loss = loss * self.window
        if loss is None and self._loses and not watch.stream.blind:
            self.say(trainer, "doctor: training_step returns no loss, so its course is not judged")
        watch.step(loss, y=self._target(batch) if watch.wants_targets else None)
        if watch.looks != self._looks:
            self._looks = watch.looks
            self.answer(trainer, pl_module)

    def _target(self, batch: Any) -> object:
        try:
            return self._reading.split(batch)[1]
        except (InputError, LookupError, TypeError):
            return None  # a batch of another kind

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._guarded(trainer, lambda: self._validated(trainer, pl_module))
            if self.together:
                self.agree(trainer, pl_module)

    def _validated(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            known = trainer.callback_metrics
            loss, acc = (next((float(known[k]) for k in keys if k in known), None) for keys in (_LOSSES, _ACCURACIES))
            given = {"loss": loss, "acc": acc}
            self._watch.validate(**{k: v for k, v in given.items() if v is not None})
            self.answer(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._guarded(trainer, lambda: self._end(trainer, pl_module))

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            notes = self._watch.report().notes
            self._watch.__exit__()
            self.answer(trainer, pl_module, ended=True)
            self.advise(trainer)
            for note in notes:
                self.say(trainer, f"doctor: {note}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._shut()


def part_of(module: LightningModule, optimizer: Optimizer, optimizers: int) -> nn.Module:
    """What is watched of a module: its one network; of several optimizers, the part whose parameters the first has."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if optimizers > 1:
        fitting = [m for _, m in module.named_modules() if m is not module and {id(p) for p in m.parameters()} == mine]
        return fitting[0] if fitting else module
    alone = network(module, None)
    whole = alone is not None and {id(p) for p in module.parameters()} == {id(p) for p in alone.parameters()}
    return alone if alone is not None and whole else module


def loss_of(outputs: STEP_OUTPUT) -> Tensor | None:
    """The loss in what training_step returned: itself, or under "loss"; None where there is none."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return found.detach() if isinstance(found, Tensor) and found.numel() == 1 and not torch.is_complex(found) else None

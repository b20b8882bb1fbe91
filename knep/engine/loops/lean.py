"""Lightning's loop over the batches of an epoch, with the hooks that do something called directly.

The same hooks in the same order, the same counters and the same checkpoints as Lightning's own loop, whose calls of
empty hooks, profilers and loggers cost more than the step of a small network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.progress import _BatchProgress
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from knep.engine.loops.exact import ExactEpoch
from knep.tasks.base import Batch

Hook = Callable[..., Any]

_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


# The loop of Lightning that this one was compared to, counter by counter; any other release runs its own.
_KNOWN = "2.6."


def use_lean_loop(trainer: Trainer) -> bool:
    """Gives `trainer`, whose loops are exact, the lean loop where it does the same as Lightning's.

    That is on one device, without a loss scale and without a profiler.
    """
    if not lightning.__version__.startswith(_KNOWN):
        return False
    plugin = trainer.precision_plugin
    unscaled = type(plugin) is Precision or (type(plugin) is MixedPrecision and plugin.scaler is None)
    alone = type(trainer.strategy) is SingleDeviceStrategy
    if not (alone and unscaled and isinstance(trainer.profiler, PassThroughProfiler)):  # type: ignore[attr-defined]
        return False
    before = trainer.fit_loop.epoch_loop
    lean = LeanEpoch(trainer, before.min_steps, before.max_steps)
    assert isinstance(before, ExactEpoch)
    lean.keeper = before.keeper
    trainer.fit_loop.epoch_loop = lean
    return True


class LeanEpoch(ExactEpoch):
    """One epoch of training batches for a module with automatic optimization and one optimizer."""

    _validates: bool | None = None

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        trainer = self.trainer
        self._module: Any = trainer.lightning_module
        self._hooks = {name: _bound(trainer, self._module, name) for name in _HOOKS}
        self._optimizer = trainer.optimizers[0]
        self._context = getattr(trainer.precision_plugin, "autocast_context_manager", contextlib.nullcontext)
        self._plateaus = any(c.reduce_on_plateau and c.interval != "validation" for c in trainer.lr_scheduler_configs)
        self._validates = super()._should_check_val_epoch()
        self._moves = not getattr(trainer.train_dataloader, "on_device", False)
        self._between = self._validates_after()

    def _validates_after(self) -> float:
        """Batches from one validation to the next; 0 where Lightning has to be asked after each batch."""
        trainer = self.trainer
        timed = trainer._val_check_time_interval  # type: ignore[attr-defined]
        by_count = trainer.check_val_every_n_epoch is not None and timed is None
        every = trainer.val_check_batch
        return every if by_count and not self._plateaus and every not in (None, float("inf")) else 0

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """One batch. The first one after a resumption that is not exact is Lightning's, which knows where to begin."""
        if self.restarting:
            super().advance(data_fetcher)
            return
        trainer, progress = self.trainer, self.batch_progress
        if self.val_loop.restarting:
            self.val_loop.restarting = False
        batch = next(data_fetcher)[0]
        batch_idx = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        if self._moves:
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        progress.increment_ready()
        self._open(batch)
        self._run("on_train_batch_start", batch, batch_idx)
        progress.increment_started()
        loss = self._optimize(batch, batch_idx)
        progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._run("on_train_batch_end", {"loss": loss}, batch, batch_idx)
        self._publish(progress)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """What follows a batch: validation, where one is due, and the keeper. Most batches have nothing to follow."""
        trainer, done = self.trainer, self.batch_idx + 1
        due = self.batch_progress.is_last_batch or not self._between or done % self._between == 0
        if due or trainer.should_stop or trainer.received_sigterm or self._skip_next_val:
            super().on_advance_end(data_fetcher)
            return
        self._batches_that_stepped += not self._should_accumulate()
        self.keeper.after_batch(trainer)

    # Lightning asks these several times a step: most answers are fixed for an epoch.

    def _should_accumulate(self) -> bool:
        return self.trainer.accumulate_grad_batches > 1 and super()._should_accumulate()

    def _should_check_val_epoch(self) -> bool:
        return super()._should_check_val_epoch() if self._validates is None else self._validates

    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        if update_plateau_schedulers:
            if self._plateaus:
                super().update_lr_schedulers(interval, update_plateau_schedulers=True)
            return
        if interval == "step" and self._should_accumulate():
            return
        done = 1 + (self.batch_idx if interval == "step" else self.trainer.current_epoch)
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and not config.reduce_on_plateau and done % config.frequency == 0:
                self.scheduler_progress.increment_ready()
                self._module.lr_scheduler_step(config.scheduler, None)
                self.scheduler_progress.increment_completed()

    def _open(self, batch: Batch) -> None:
        """Whether this is an epoch's first batch, and the batch itself, for `self.log` in the hooks to come."""
        connector, results = self.trainer._logger_connector, self._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None

    def _publish(self, progress: _BatchProgress) -> None:
        """What hooks logged goes to the loggers; where they logged nothing, there is nothing to collect."""
        connector, results = self.trainer._logger_connector, self._results
        if results:
            connector.on_batch_end()
        else:
            results.batch = results.batch_size = None
        progress.increment_completed()
        if results:
            connector.update_train_step_metrics()

    def _run(self, name: str, *args: object) -> None:
        hooks = self._hooks[name]
        if hooks:
            self._module.__dict__["_current_fx_name"] = name  # past nn.Module's slow __setattr__; `self.log` reads it
            for hook in hooks:
                hook(*args)
            self._module.__dict__["_current_fx_name"] = None

    def _optimize(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss (a 0-dim tensor) of one batch, after a step of the optimizer or without one while accumulating."""
        losses: list[Tensor] = []
        gradients = partial(self._gradients, batch, batch_idx, losses)
        if self._should_accumulate():
            gradients()
        else:
            steps = self.automatic_optimization.optim_progress.optimizer.step
            steps.increment_ready()
            closure = partial(self._clipped, gradients)
            self._module.optimizer_step(self.trainer.current_epoch, batch_idx, self._optimizer, closure)
            steps.increment_completed()
        return losses[-1]

    def _clipped(self, gradients: Callable[[], Tensor]) -> Tensor:
        loss = gradients()
        self._run("on_before_optimizer_step", self._optimizer)
        self._module.configure_gradient_clipping(self._optimizer)
        return loss

    def _gradients(self, batch: Batch, batch_idx: int, losses: list[Tensor]) -> Tensor:
        module, window = self._module, self.trainer.accumulate_grad_batches
        with torch.enable_grad():
            module.__dict__["_current_fx_name"] = "training_step"
            with self._context():
                loss = module.training_step(batch, batch_idx)
            if window > 1:
                loss = loss / window
            if batch_idx % window == 0:
                self._clear(batch_idx)
            self._run("on_before_backward", loss)
            module.backward(loss)
        losses.append(loss.detach())
        self._run("on_after_backward")
        return losses[-1]

    def _clear(self, batch_idx: int) -> None:
        cleared = self.automatic_optimization.optim_progress.optimizer.zero_grad
        cleared.increment_ready()
        self._run("on_before_zero_grad", self._optimizer)
        cleared.increment_started()
        self._module.optimizer_zero_grad(self.trainer.current_epoch, batch_idx, self._optimizer)
        cleared.increment_completed()


def _bound(trainer: Trainer, module: LightningModule, name: str) -> list[Hook]:
    """The hooks of this name that do something: the callbacks' first, then the module's."""
    empty = getattr(Callback, name)
    hooks: list[Hook] = [
        partial(getattr(callback, name), trainer, module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if getattr(type(callback), name) is not empty and not _saves_at_epochs(callback, name)
    ]
    if getattr(type(module), name) is not getattr(LightningModule, name):
        hooks.append(getattr(module, name))
    return hooks


def _saves_at_epochs(callback: Callback, name: str) -> bool:
    """Whether this is a checkpoint callback that has nothing to do between epochs."""
    return (
        name == "on_train_batch_end"
        and type(callback) is ModelCheckpoint
        and callback._every_n_train_steps < 1
        and callback._train_time_interval is None
    )

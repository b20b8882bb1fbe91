"""The guard at work in one fit: looks at each step before it reaches the weights, and answers for the bad ones.

    before_pass -- forward, backward -- judge --> optimizer -- after_step --> the rest of the loop
                                          |                        |
                                          +------- BadStep --------+--> answer: skip, roll back, or stop

A bad step is raised inside the optimizer's closure, before the optimizer moved anything, so that the loop goes on as
after any other step. Weights that the optimizer itself made bad are put back to what they were before it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from knep.errors import RunFailed
from knep.guard.black_box import write_box
from knep.guard.finite import Copies, finite
from knep.guard.guarded import Guarded
from knep.guard.loss_spikes import Spikes
from knep.guard.optimizer_state import LOOK_EVERY, carries, forget_bad_state, state_is_finite
from knep.guard.policy import KINDS, OF_OPTIMIZER, Guard
from knep.guard.snapshot import Snapshot
from knep.guard.step_state import Moment, grads
from knep.tasks.base import Batch
from knep.utils.batch_plan import accumulates
from knep.utils.rng import reseed, rng_state, set_rng_state


class BadStep(Exception):
    """A step that must not count. kind: see KINDS; step: its number, where it is not the present one."""

    def __init__(self, kind: str, step: int | None = None) -> None:
        super().__init__(kind)
        self.kind, self.step = kind, step


class Sentry:
    """Watches the steps of `module` (a Classifier in a fit) by the rules of `guard`.

    Weights and buffers are copied before they can change, to go back to, on one device and in DDP; where a strategy
    shards them, the loss and the gradient alone are looked at.

    batch, batch_idx, loss: of the last pass; weights, buffers: what they go back to; weights_tell: whether a look at
    the weights after the step is enough.
    """

    batch: Batch

    def __init__(self, guard: Guard, module: Guarded, state: dict[str, Any] | None = None) -> None:
        if state:
            guard.load_state_dict(state)
        state = state or {}
        self.guard, self._module, self.trainer = guard, module, module.trainer
        self.spikes = Spikes(guard.spike, state.get("losses"))
        self.owners = list(module.model.parameters())
        whole = isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        buffers = [b for b in module.model.buffers() if b.is_floating_point() and finite([b])]
        self.weights = Copies(self.owners if whole else ())
        self.buffers = Copies(module.model.buffers() if whole else ())
        self.checked = [*self.weights.live, *(b.detach() for b in buffers)] if whole else []
        self._alone = self.trainer.world_size == 1
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self._looks_at_gradients = not scaled  # a loss scale overflows by design, and drops the step itself
        self._loss_so_far, self._spoiled = state.get("loss_so_far", 0.0), state.get("spoiled")
        # Looking at the weights after the step is enough where nothing has to be undone in the optimizer.
        plain = (
            guard.action == "stop" and whole and self._alone and not accumulates(self.trainer) and not module.step.edits
        )
        self.weights_tell = plain and carries(self._optimizer)
        self._looks_at_state, self._looked = whole, -1
        every = (module.about.get("config") or {}).get("checkpoint", {}).get("every")
        self._every = every if isinstance(every, int) else LOOK_EVERY
        self.batch_idx, self._passes = -1, 0
        self._rng: dict[str, Tensor] | None = None
        self._gradients: dict[str, Tensor] = {}
        self.loss = torch.zeros(())
        self._step_loss, self._in_step = 0.0, False
        self._snapshot: Snapshot | None = None
        if guard.action == "rollback":
            self._snapshot = Snapshot(module, state.get("snapshot"))

    @property
    def _window(self) -> int:
        return self.trainer.accumulate_grad_batches  # another one in a later epoch, where batches grow

    def state_dict(self, scheduled: bool) -> dict[str, Any]:
        """What a resumed run goes on with. scheduled: False where a signal asked for the checkpoint.

        A run that is never interrupted does not have that one to go back to: the one before travels in it.
        """
        kept: dict[str, Any] = {}
        if self.guard.action == "rollback" and scheduled:
            self._snapshot = Snapshot(self._module)
        elif self._snapshot is not None:
            kept = {"snapshot": self._snapshot.state_dict()}
        state = {"losses": self.spikes.losses, "loss_so_far": self._loss_so_far, "spoiled": self._spoiled}
        return state | self.guard.state_dict() | kept

    def before_batch(self, batch: Batch, batch_idx: int) -> None:
        """Notes what the first forward and backward pass on a batch starts from."""
        self.batch, self.batch_idx, self._passes, self._rng = batch, batch_idx, 0, None
        self.buffers.take()
        if self._window > 1:
            inside = batch_idx % self._window > 0
            self._gradients = {name: g.clone() for name, g in grads(self._module).items()} if inside else {}

    def before_pass(self) -> None:
        """An optimizer that looks twice at a batch draws on from where the first pass ended."""
        self._passes += 1
        if self._passes > 1:
            self._rng = rng_state(self._module.device)

    def after_pass(self, loss: Tensor) -> None:
        """loss: of the training step, 0-dim."""
        self.loss = loss.detach()

    def after_micro_batch(self) -> bool:
        """Judges a micro-batch that is not the last of its window; returns whether it was good."""
        kind = self._spoiled or self._wrong(None)
        self._loss_so_far += self._value / self._window
        if kind and not self._spoiled:
            if self._stops_next:
                self.answer(BadStep(kind))
            self._spoiled = kind
            self.buffers.restore()
        return not kind

    def judge(self, norm: Tensor | None) -> None:
        """Looks at the loss and the gradient. norm: of the gradient, where it was measured. Raises BadStep."""
        kind = self._wrong(norm)
        if self._passes == 1:
            loss = (self._loss_so_far + self._value / self._window) * self._module.window_scale
            if not self._alone and self.spikes.limit is not None:
                loss = float(self.trainer.strategy.reduce(torch.tensor(loss), reduce_op="mean"))
            if not kind and self.spikes.strikes(loss):
                kind = "spike"
            self._step_loss = loss
        self.raise_if(self._spoiled or kind)

    def after_step(self) -> None:
        """Looks at what the optimizer made of the weights, and now and then of its state. Raises BadStep."""
        kind = None
        if not finite(self.checked):
            kind = "weights" if not self.weights_tell or finite(self.found_gradients()) else "gradient"
        else:
            done = self.trainer.global_step + 1
            kind = self.wrong_state(done) if self.looks_closely(done) else None
        self.raise_if(kind)
        self.spikes.accept(self._step_loss)
        self._loss_so_far = 0.0

    def settle(self) -> None:
        """Before anything is evaluated or saved: answers for what has not been judged yet."""

    def before_save(self) -> None:
        """Before a checkpoint that no step knew of: looks at the optimizer's state, and answers for a bad one."""
        self.settle()
        try:
            self.raise_if(self.wrong_state(self.trainer.global_step))
        except BadStep as bad:
            self.answer(bad)

    def begin(self, optimizer: Optimizer) -> list[float]:
        """Before an optimizer's step: copies the weights, and lowers the rates after rollbacks. Returns what they were.

        `end` follows, whatever happens: these two are no context manager, whose generator costs 1 % of a small step.
        """
        self.weights.take()
        self._in_step = True
        rates = [group["lr"] for group in optimizer.param_groups] if self.guard.factor != 1 else []
        for group in optimizer.param_groups if rates else ():
            group["lr"] *= self.guard.factor
        return rates

    def end(self, optimizer: Optimizer, rates: list[float]) -> None:
        """After the step: puts the rates back that `begin` returned."""
        self._in_step = False
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate

    def answer(self, bad: BadStep) -> None:
        """Undoes a bad step as the guard says. Raises RunFailed where the run ends with it."""
        kind, step = bad.kind, self.trainer.global_step if bad.step is None else bad.step
        if self.guard.decide(kind) == "stop":
            raise RunFailed(self._stop(kind, step)) from bad
        self._undo()
        what = "dropped"
        if kind in OF_OPTIMIZER:
            forget_bad_state(self._optimizer)
        if self.guard.action == "rollback" and self._snapshot is not None:
            self._snapshot.restore(self._module)
            what = f"back to the last checkpoint, learning rate x {self.guard.factor:g}"
        self._loss_so_far, self._spoiled = 0.0, None
        self._tell(f"guard: step {step}: {KINDS[kind]}: {what} ({self.guard.interventions} of {self.guard.budget})")

    def moment(self, first: bool) -> Moment:
        """What the last pass on the batch started from; first: the first pass, where there were two."""
        module, rng = self._module, self._rng
        if first or rng is None:
            before = rng_state(module.device)
            reseed(module.step_seed(self.batch_idx), module.device)
            rng = rng_state(module.device)
            set_rng_state(before, module.device)
        weight, scale = module.weight(len(self.batch[0])), module.window_scale
        return Moment(self.batch, rng, self._gradients, weight, self._window, module.augment.epoch, scale)

    @property
    def _stops_next(self) -> bool:
        return self.guard.action == "stop" or self.guard.interventions >= self.guard.budget

    def _wrong(self, norm: Tensor | None) -> str | None:
        self._value = self.loss.item()
        if not math.isfinite(self._value):
            return "loss"
        if not self._looks_at_gradients:
            return None
        if norm is not None:
            return None if math.isfinite(norm.item()) else "gradient"
        return None if self.weights_tell or finite(self.found_gradients()) else "gradient"

    def looks_closely(self, done: int) -> bool:
        return done % LOOK_EVERY == 0 or done % self._every == 0 or self.trainer.is_last_batch

    def wrong_state(self, done: int) -> str | None:
        """Looks once at the state that the optimizer has after so many steps."""
        if not self._looks_at_state or self._looked == done:
            return None
        self._looked = done
        return None if state_is_finite(self._module.model, self._optimizer) else "state"

    def found_gradients(self) -> list[Tensor]:
        return [p.grad for p in self.owners if p.grad is not None]

    @property
    def _optimizer(self) -> Optimizer:
        return self.trainer.optimizers[0]

    def raise_if(self, kind: str | None) -> None:
        """All processes decide alike."""
        if not self._alone and self.trainer.strategy.reduce_boolean_decision(bool(kind), all=False):
            kind = kind or "elsewhere"
        if kind:
            raise BadStep(kind)

    def _undo(self) -> None:
        if self._in_step:
            self.weights.restore()
        self.buffers.restore()

    def _stop(self, kind: str, step: int) -> str:
        """Leaves a black box and says why the run ends."""
        module, trainer = self._module, self.trainer
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        path = Path(trainer.default_root_dir) / f"blackbox{rank}.pt"
        if kind in OF_OPTIMIZER or self.weights_tell:
            self.weights.restore()  # what is repeated starts before the optimizer's step
        self.buffers.restore()
        moment = self.moment(first=kind in OF_OPTIMIZER)
        loss = (self.loss / self._window if self._window > 1 else self.loss).item()
        place = write_box(module, kind, moment, loss, self.batch_idx, step, path if module.about else None)
        self._undo()
        line = f"step {step}: {KINDS[kind]}" + (f", first in {place}" if place else "")
        if not module.about:
            return line
        return f"{line}; the step is kept in {path}, look at it with: python train.py replay={path}"

    def _tell(self, line: str) -> None:
        trainer = self.trainer
        if trainer.is_global_zero:
            getattr(trainer.progress_bar_callback, "line", print)(line)
        for logger in trainer.loggers:
            logger.log_metrics({"guard/interventions": float(self.guard.interventions)}, step=trainer.global_step)

"""A sentry that never waits for the step that the device is computing: each is judged at the end of the next one.

Where a run stops at its first bad step there is nothing to decide before the next one begins, as long as what is bad
can still be undone and repeated as its own step found it. Before anything is evaluated or saved, and at the end of an
epoch, the last verdict is read at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from knep.guard.finite import Copies
from knep.guard.guarded import Guarded
from knep.guard.policy import Guard
from knep.guard.step_guard import BadStep, Sentry
from knep.tasks.base import Batch
from knep.utils.batch_plan import accumulates

# Devices that compute while the host goes on: to read a number of the present step is to wait for all of it.
LATE_ON = frozenset({"cuda"})


def sentry_of(guard: Guard, module: Guarded, state: dict[str, Any] | None) -> Sentry:
    """The sentry for a fit of `module` (a Classifier): one that judges late where that changes nothing but the wait."""
    trainer = module.trainer
    late = (
        module.device.type in LATE_ON
        and guard.action == "stop"
        and guard.spike is None  # which looks at losses that are accepted already
        and isinstance(trainer.strategy, SingleDeviceStrategy)
        and not accumulates(trainer)
        and getattr(trainer.precision_plugin, "scaler", None) is None
        and not hasattr(trainer.optimizers[0], "base_optimizer")  # SAM's second pass depends on the first
    )
    return (LateSentry if late else Sentry)(guard, module, state)


@dataclass
class Verdict:
    """What a step is judged by, and what undoing and repeating it takes.

    numbers: float64 (3,), of the loss, the gradient and the weights, finite where all of theirs are; on the host once
    `ready` has happened.
    """

    step: int
    batch: Batch
    batch_idx: int
    loss: Tensor
    weights: Copies
    buffers: Copies
    numbers: Tensor
    ready: torch.cuda.Event | None

    def kind(self) -> str | None:
        """What is wrong (see KINDS); waits for the device where it is not yet past the step."""
        if self.ready is not None:
            self.ready.synchronize()
        good = self.numbers.isfinite().tolist()
        return next((kind for kind, fine in zip(("loss", "gradient", "weights"), good, strict=True) if not fine), None)


class LateSentry(Sentry):
    """Keeps what two steps began from, in turn."""

    def __init__(self, guard: Guard, module: Guarded, state: dict[str, Any] | None = None) -> None:
        super().__init__(guard, module, state)
        self._last: Verdict | None = None  # of the step before, not read yet
        self._spare = Copies(self.owners), Copies(module.model.buffers())
        self._norm: Tensor | None = None
        self.weights_tell = True  # when a bad step is known the optimizer has been there: its weights go back

    def before_batch(self, batch: Batch, batch_idx: int) -> None:
        (self.weights, self.buffers), self._spare = self._spare, (self.weights, self.buffers)
        super().before_batch(batch, batch_idx)

    def judge(self, norm: Tensor | None) -> None:
        self._norm = norm

    def after_step(self) -> None:
        """Sends this step's verdict on its way, and reads the one of the step before. Raises BadStep."""
        step = self.trainer.global_step
        gradient = self._norm if self._norm is not None else largest(self.found_gradients())
        sums = sent([self.loss, gradient, largest(self.checked)])
        self._read()
        self._last = Verdict(step, self.batch, self.batch_idx, self.loss, self.weights, self.buffers, *sums)
        if self.looks_closely(step + 1):
            self._read()
            self.raise_if(self.wrong_state(step + 1))

    def settle(self) -> None:
        try:
            self._read()
        except BadStep as bad:
            self.answer(bad)

    def _read(self) -> None:
        """Reads the verdict that is out; goes back to what its step found where that was bad. Raises BadStep."""
        last, self._last = self._last, None
        kind = last.kind() if last is not None else None
        if last is not None and kind:
            self.batch, self.batch_idx, self.loss = last.batch, last.batch_idx, last.loss
            self.weights, self.buffers = last.weights, last.buffers
            raise BadStep(kind, last.step)


def sent(numbers: Sequence[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    """The numbers (n,) on their way to the host, and the event of their arrival; None where they are there."""
    found = torch.stack([n.detach().double() for n in numbers])
    if found.device.type != "cuda":
        return found, None
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """max |x| over tensors of one device, 0-dim float64: exact, so that it cannot overflow; NaN where one is."""
    return torch.stack([n.double() for n in torch._foreach_norm(list(tensors), float("inf"))]).amax()

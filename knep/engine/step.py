"""One training step, and where each slot acts:

    batch -- augment -- scaling --> model[norm, activation, dropout] --> task.loss (+ regularization) --> backward
          -- clip --> optimizer -- regularization, scheduler --> averaging ... epoch end: validate --> stopping

`init` acts once, before the first step; the test split is read once, after the last. Lightning's loop and the lean one
(by way of `engine.module`), members that train in their turn, the replay of a bad step and the doctor's trials all
take these steps; members in one pass have a stack of weights, and sums of their own over it (`ensemble.steps`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.optim.gradients import gradients, scale_
from knep.optim.param_groups import decayed, rate
from knep.recipes import clip as clips
from knep.recipes.regularization import Regularizer
from knep.tasks.base import Augment, Batch, Counted, Task

Clip = Callable[[Iterable[Tensor]], Tensor]
Guide = Callable[[Tensor, Tensor, Tensor], Tensor]  # raw input, output and loss to another loss
Context = Callable[[], AbstractContextManager]


class Pass(NamedTuple):
    """total: what goes backward, 0-dim; loss, penalty: its parts before any weight; counted: of the batch."""

    total: Tensor
    loss: Tensor
    penalty: Tensor | float
    counted: Counted


class Step:
    """The parts of a step, in the order in which they act.

    forward: raw input to the model's output, by way of the scaling; model: whose parameters are stepped; augment, clip,
    regularization: options of their slots.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        model: nn.Module,
        task: Task,
        *,
        augment: Augment,
        clip: Clip,
        regularization: Regularizer,
    ) -> None:
        self.forward, self.model, self.task = forward, model, task
        self.augment, self.regularization = augment, regularization
        self.decayed = decayed(model)  # once: looking for them takes longer than a step of a small model
        self.parameters = list(model.parameters())
        self.checked = False  # whether the task has looked at a first batch
        self.edits = type(regularization).after_step is not Regularizer.after_step
        self.guide: Guide | None = None  # of a teacher, where there is one
        self.clip_by(clip)

    def clip_by(self, clip: Clip) -> None:
        """Exchanges the option of the slot `clip`."""
        self._clip = _plain(clip)
        self.clips = getattr(self._clip, "func", self._clip) is not clips.none

    def loss(self, batch: Batch, weight: float = 1.0) -> Pass:
        """Augments a raw batch and passes it through the model: the loss with its penalty, times `weight`."""
        x, target = self.task.augmented(*self.task.split(batch), self.augment)
        output = self.forward(x)
        if not self.checked:
            self.check(output, target)
        loss = self.task.loss(output, target)
        if self.guide is not None:
            loss = self.guide(x, output, loss)
        with torch.no_grad():
            counted = self.task.counted(output, target, loss)
        # Terms and factors that change nothing are left out: each would be a kernel forward and another backward.
        penalty = self.regularization.penalty(self.decayed)
        total = loss if isinstance(penalty, float) and not penalty else loss + penalty
        return Pass(total if weight == 1 else total * weight, loss, penalty, counted)

    def check(self, output: Any, target: Any) -> None:
        """Whether output and target fit, once: looking waits for the device. Raises InputError where they do not."""
        self.task.check(output, target)
        self.checked = True

    def backward(self, batch: Batch, weight: float, context: Context) -> Pass:
        """`loss` under a context such as autocast, and its gradients, added to those that are there."""
        with torch.enable_grad():
            with context():
                found = self.loss(batch, weight)
            found.total.backward()
        return found

    def scale(self, factor: float | Tensor) -> None:
        """Multiplies the gradients, such as those of a window that was shorter than planned."""
        if isinstance(factor, Tensor) or factor != 1:
            scale_(gradients(self.parameters), factor)

    def clip(self) -> tuple[Sequence[Tensor], Tensor]:
        """Edits the gradients as the recipe says; returns their owners and the norm before, 0-dim."""
        owners = [p for p in self.parameters if p.grad is not None]
        return owners, self._clip(owners)

    def clear(self) -> None:
        """What `optimizer.zero_grad` does, without its profiling."""
        for p in self.parameters:
            p.grad = None

    def after(self, optimizer: Optimizer) -> None:
        """What the recipe's regularization does to the weights after the optimizer's step."""
        if self.edits:
            with torch.no_grad():
                self.regularization.after_step(self.decayed, rate(optimizer))

    def take(self, optimizer: Optimizer, closure: Callable[[], Tensor]) -> None:
        """A whole step. closure: leaves clipped gradients, and is called as often as the update rule asks for it."""
        optimizer.step(closure)  # type: ignore[arg-type]
        self.after(optimizer)
        self.clear()


def _plain(function: Clip) -> Clip:
    """Without the checks that Hydra repeats at each call of a target which it has checked when it made it."""
    if isinstance(function, functools.partial):
        return functools.partial(function.func, *function.args, **function.keywords)
    return function

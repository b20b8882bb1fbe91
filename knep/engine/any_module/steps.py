"""The slots that act in each step: noise on the batch, smoothed labels, the penalty's gradient, and clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.engine.any_module.own_loss import loss_functions, smoothing_line
from knep.engine.any_module.part import Part, described, name_of, network, refuse_left_behind, refuse_more_rows
from knep.errors import InputError, named
from knep.optim.gradients import gradients
from knep.tasks.batches import Reading
from knep.tasks.smoothed import smoothing_calls


class Steps:
    """The steps of one fit; the rest as for `RecipeCallback`."""

    def __init__(self, parts: list[Part], *, reading: Reading, num_classes: int | None) -> None:
        self._parts, self._reading, self._num_classes = parts, reading, num_classes
        self._taken: dict[float, int] = {}  # epsilon -> calls of smoothed losses before the first step
        self._losses: list[str] = []  # that the module's own step computed

    @property
    def _begins(self) -> bool:
        """Whether no step was taken yet."""
        return not any(part.steps for part in self._parts)

    def begin(self) -> None:
        """Before a batch's training_step."""
        if self._begins:
            smoothing = {part.recipe.regularization.label_smoothing for part in self._parts} - {0.0}
            self._taken, self._losses = {epsilon: smoothing_calls(epsilon) for epsilon in smoothing}, []

    def see_loss(self, loss: Tensor) -> None:
        """Before a backward pass."""
        if self._taken and self._begins:
            self._losses += loss_functions(loss)

    def first_step(self, module: LightningModule, own: Callable[..., Any]) -> Callable[..., Any]:
        """A training_step that meets mixed labels for the first time may not know them."""

        def training_step(*args: Any, **kwargs: Any) -> Any:
            try:
                return own(*args, **kwargs)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if isinstance(error, InputError) or not self._begins:
                    raise
                raise InputError(
                    f"augment= mixes labels into probabilities (N, K), and {name_of(module)}.training_step fails "
                    f"on them ({' '.join(str(error).split())[:100]}): take a loss and metrics that read them, give "
                    "targets of floats where they are numbers, or write augment=none"
                ) from error

        return training_step

    def augmented(self, batch: Any) -> Any:
        part = next(part for part in self._parts if part.augments)
        x, target = self._reading.split(batch)
        if not isinstance(x, Tensor):
            raise InputError(f"augment= reads tensors, and the input is a {type(x).__name__}: write augment=none")
        refuse_left_behind(batch, x, target)
        if target is None:
            keys = isinstance(batch, Mapping) and next((key for key, value in batch.items() if value is x), None)
            name = f'name it, batch=("{keys}", "key of target"), or write' if keys else "write"
            raise InputError(
                f"augment= changes input and target, and the target is not found in a batch: {name} augment=none"
            )
        if part.repeats:
            refuse_more_rows(batch, x, target)
        with named("augment"):
            try:
                new, labels = part.recipe.augment.train()(x, target, self._classes(part, target))
            except RuntimeError as error:
                raise InputError(
                    f"augment= fails on targets {described(target)} with num_classes={self._num_classes}: "
                    f"{' '.join(str(error).split())[:120]}"
                ) from error
        part.augmented += torch.is_grad_enabled()  # not where batch-norm statistics are estimated
        return self._reading.joined(batch, new, labels)

    def _classes(self, part: Part, target: Any) -> int:
        if self._num_classes is not None:
            return self._num_classes
        if part.mixes and not (isinstance(target, Tensor) and target.is_floating_point()):
            raise InputError(
                f"augment={part.mixing} mixes classes, and nobody says how many there are: give num_classes=, targets "
                "of floats where they are numbers, or write augment=none"
            )
        return 0

    def before_optimizer(self, module: LightningModule, part: Part, optimizer: Optimizer) -> None:
        """The penalty's gradient, then clip: both on gradients that are unscaled."""
        self._see_smoothing(part, module)
        if part.decayed:
            with torch.enable_grad():
                penalty = part.recipe.regularization.penalty(part.decayed)
            if isinstance(penalty, Tensor):
                weights = [p for p in part.decayed if p.grad is not None]
                slopes = torch.autograd.grad(penalty, weights, allow_unused=True)
                for p, slope in zip(weights, slopes, strict=True):
                    if slope is not None and p.grad is not None:
                        p.grad.add_(slope)
                part.penalised += 1
        if part.clips:
            owners = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            before = part.recipe.clip(owners)
            after = nn.utils.get_total_norm(gradients(owners))
            part.gradients += 1
            part.clipped = part.clipped + ((after - before).abs() > 1e-6 * before).float()

    def _see_smoothing(self, part: Part, module: LightningModule) -> None:
        epsilon = part.recipe.regularization.label_smoothing
        if not epsilon:
            return
        if not part.steps and smoothing_calls(epsilon) <= self._taken.get(epsilon, 0):
            net = network(module, part.path)
            line = smoothing_line(module, net, self._losses, epsilon)
            raise InputError(
                f"regularization=label_smoothing acts in the loss, which {name_of(module)} computes itself: {line}"
            )
        part.smoothed += 1

"""What a guard takes: a module in a fit, as far as it looks at one, such as `knep.engine.module.Classifier`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from knep.tasks.base import Augment, Batch


class PassLoss(Protocol):
    """What a pass comes to."""

    @property
    def total(self) -> Tensor: ...


class GuardedStep(Protocol):
    """The parts of a step: `knep.engine.step.Step`."""

    @property
    def edits(self) -> bool: ...

    def loss(self, batch: Batch, weight: float = 1.0) -> PassLoss: ...

    def clip(self) -> tuple[Sequence[Tensor], Tensor]: ...


class Guarded(Protocol):
    """The module around a model, with the step that trains it and all that the step depends on."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def step(self) -> GuardedStep: ...

    @property
    def augment(self) -> Augment: ...

    @property
    def about(self) -> Mapping[str, Any]: ...

    @property
    def window_scale(self) -> float: ...

    @property
    def trainer(self) -> Trainer: ...

    @property
    def device(self) -> torch.device: ...

    def weight(self, images: int) -> float: ...

    def step_seed(self, batch_idx: int) -> int: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

"""What every stage is: it acts on training batches, up to an epoch, and says in one line what it cannot change."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from knep.errors import InputError

__all__ = ["none"]


class Identity(nn.Module):
    mixes: ClassVar[bool] = False

    def sizes(self, whole: int) -> list[int]:
        return []

    def forward(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        return x, y


def none() -> nn.Module:
    """Batches as they are."""
    return Identity()


class Stage(nn.Module):
    """Acts in training mode only, and before `off_epoch`; subclasses say how, in `change`.

    epoch: set by whoever trains, before each epoch, from 0. mixes: whether images of several classes become one;
    repeats: whether rows of the batch are exchanged for others.
    off_epoch: the first epoch in which it acts no more, None for never. Raises ValueError below 0.
    """

    mixes: ClassVar[bool] = False
    repeats: ClassVar[bool] = False
    epoch = 0

    def __init__(self, *, off_epoch: int | None = None) -> None:
        super().__init__()
        if off_epoch is not None and off_epoch < 0:
            raise ValueError(f"off_epoch must be at least 0, or null for never, got {off_epoch}")
        self._off_epoch = off_epoch

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def sizes(self, whole: int) -> list[int]:
        """Sides other than `whole` that training images of this side are given; none where they keep it."""
        return []

    def ended(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """A training batch from `off_epoch` on."""
        return x, y

    def forward(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        if not self.training:
            return x, y
        acts = self._off_epoch is None or self.epoch < self._off_epoch
        return (self.change if acts else self.ended)(x, y, num_classes)


def probability(name: str, p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {p}")
    return p


def refuse_other(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise InputError(f"augment={name} takes images (N, C, H, W), got {tuple(x.shape)}: write augment=none")


def refuse_other_colours(name: str, x: Tensor) -> None:
    """Raises InputError for what has no colours in 0..255 to change."""
    refuse_other(name, x)
    if x.shape[1] not in (1, 3):
        raise InputError(f"augment={name} knows grey and RGB images, got {x.shape[1]} channels: write augment=flip")


def refuse_other_pixels(name: str, x: Tensor) -> None:
    """Raises InputError for what is no raw image of 8 bits."""
    refuse_other_colours(name, x)
    if x.dtype != torch.uint8:
        raise InputError(
            f"augment={name} takes raw pixels, uint8 in 0..255, and these are {str(x.dtype).removeprefix('torch.')}: "
            "write augment=flip"
        )


def is_picture(name: str, x: Tensor, y: Tensor) -> bool:
    """Whether the target is an image that moves with x, rather than one answer or a few numbers a row."""
    if not isinstance(y, Tensor):
        raise InputError(
            f"augment={name} would move images away from a target of {type(y).__name__}: write augment=none"
        )
    if y.dim() < 3:
        return False
    if y.dim() > 4 or y.shape[-2:] != x.shape[-2:]:
        raise InputError(
            f"augment={name} would move images {tuple(x.shape)} away from a target {tuple(y.shape)}: write augment=none"
        )
    return True


def refuse_picture(name: str, y: Tensor, remedy: str) -> None:
    if not isinstance(y, Tensor) or y.dim() > 2:
        kind = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"augment={name} cannot change a target {kind}, which is no class and no row: write {remedy}")

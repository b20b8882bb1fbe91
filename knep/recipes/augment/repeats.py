"""Several views of one image in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from knep.errors import InputError
from knep.recipes.augment.base import Stage

__all__ = ["Repeats"]


class Repeats(Stage):
    """Replaces a batch by its first images, each so many times in a row, for the stages that follow to change.

    Repeated augmentation (Hoffer et al. 2020; Berman et al. 2019), at the batch's own size as timm's
    `RepeatAugSampler` on one process: of N images the first N / times stay, and an epoch sees that share of the split.
    It acts on the batch that each process has loaded, so that views of one image stay on one device, where timm deals
    them out to several; the images that it leaves out were decoded for nothing.

    times: at least 1, fractions as timm's; off_epoch: as for `Stage`. Raises ValueError below, InputError for targets
    that are no tensor.
    """

    repeats = True

    def __init__(self, *, times: float = 3, off_epoch: int | None = None) -> None:
        super().__init__(off_epoch=off_epoch)
        if times < 1:
            raise ValueError(f"times must be at least 1, got {times}")
        self._times = times

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        if not isinstance(y, Tensor):
            raise InputError(f"augment=repeats cannot repeat a target of {type(y).__name__}: write augment=none")
        rows = torch.tensor([int(i / self._times) for i in range(len(x))]).to(x.device, non_blocking=True)
        return x[rows], y[rows]

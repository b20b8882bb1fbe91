"""Images that grow over the run: small ones are cheap, and large ones come when there is something to refine."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from knep.recipes.augment.base import Stage, is_picture, refuse_other

__all__ = ["ProgressiveResize"]


class ProgressiveResize(Stage):
    """Training images of start times their side in epoch 0, growing by equal steps to their own in epoch `off_epoch`.

    Howard 2018 (fast.ai's DAWNBench entry); Tan and Le 2021, sec. 4. The size is a function of the epoch alone, so
    that a resumed run has the same. Resampled bilinearly with antialiasing; a target that is an image follows by
    nearest neighbours.

    start: share of a side, in (0, 1); off_epoch: the first epoch with whole images, at least 1; multiple: sizes are
    multiples of so many pixels, at least 1. Raises ValueError for others.
    """

    def __init__(self, *, start: float = 0.5, off_epoch: int | None = 10, multiple: int = 4) -> None:
        super().__init__(off_epoch=off_epoch)
        if not 0 < start < 1:
            raise ValueError(f"start must be in (0, 1), got {start}")
        if off_epoch is None or off_epoch < 1:
            raise ValueError(f"off_epoch must be at least 1, the first epoch with whole images, got {off_epoch}")
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1 pixel, got {multiple}")
        self._start, self._until, self._multiple = start, off_epoch, multiple

    def side(self, whole: int, epoch: int) -> int:
        """Pixels in an epoch of images whose side is `whole`."""
        share = self._start + (1 - self._start) * min(1.0, epoch / self._until)
        return min(whole, max(self._multiple, round(whole * share / self._multiple) * self._multiple))

    def sizes(self, whole: int) -> list[int]:
        """Sides other than `whole` that images have in training."""
        return sorted({self.side(whole, epoch) for epoch in range(self._until)} - {whole})

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other("progressive_resize", x)
        new = tuple(self.side(side, self.epoch) for side in x.shape[-2:])
        if is_picture("progressive_resize", x, y):
            y = _nearest(y, new)
        if new == tuple(x.shape[-2:]):
            return x, y
        small = F.interpolate(x.float(), new, mode="bilinear", antialias=True)
        return (small if x.is_floating_point() else small.round_().clamp_(0, 255)).to(x.dtype), y


def _nearest(y: Tensor, new: tuple[int, ...]) -> Tensor:
    """A target (N, H, W) or (N, C, H, W), of any dtype."""
    images = y[:, None] if y.dim() == 3 else y
    small = F.interpolate(images.double(), new, mode="nearest").to(y.dtype)
    return small[:, 0] if y.dim() == 3 else small

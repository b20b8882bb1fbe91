"""Images moved and mirrored by whole pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.recipes.augment.base import Stage, is_picture, probability, refuse_other

__all__ = ["Flip", "Shift", "ShiftFlip"]


class Shift(Stage):
    """Moves each image by its own random offset in [-pixels, pixels] along both axes; what enters is black.

    The shift half of "pad and crop" (Lee et al. 2015; He et al. 2015, sec. 4.2). In a target that is an image, class 0
    enters. With padding "reflect" the image's own mirror image does instead, and its target's (Jordan 2024, sec. 3.6).

    pixels: at least 1, and with "reflect" below the image's sides; padding: "black" or "reflect"; off_epoch: as for
    `Stage`. Raises ValueError for others.
    """

    def __init__(self, *, pixels: int = 2, padding: str = "black", off_epoch: int | None = None) -> None:
        super().__init__(off_epoch=off_epoch)
        if pixels < 1:
            raise ValueError(f"pixels must be at least 1, got {pixels}")
        if padding not in ("black", "reflect"):
            raise ValueError(f"padding must be black or reflect, got {padding}")
        self._pixels, self._reflects = pixels, padding == "reflect"

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other("shift", x)
        n, _, height, width = x.shape
        p = self._pixels
        if self._reflects and p >= min(height, width):
            raise ValueError(f"pixels must be below the sides of images {height} x {width} to be reflected, got {p}")
        offsets = torch.randint(0, 2 * p + 1, (2, n, 1), device=x.device)
        rows = offsets[0] + torch.arange(height, device=x.device)
        columns = offsets[1] + torch.arange(width, device=x.device)
        if self._reflects:
            rows, columns = _reflected(rows - p, height), _reflected(columns - p, width)
        image = torch.arange(n, device=x.device)[:, None, None]

        def moved(x: Tensor) -> Tensor:
            padded = (x if self._reflects else F.pad(x, (p, p, p, p))).permute(0, 2, 3, 1)
            return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

        if not is_picture("shift", x, y):
            return moved(x), y
        return moved(x), moved(y) if y.dim() == 4 else moved(y[:, None])[:, 0]


def _reflected(place: Tensor, length: int) -> Tensor:
    """Places on a line of this length, those beyond its ends mirrored at the first and last."""
    place = place.abs()
    return torch.where(place < length, place, 2 * (length - 1) - place)


class Flip(Stage):
    """Mirrors each image left to right with probability p.

    With `alternate` an image is mirrored in every other epoch, half of them in the odd ones, so that both views of each
    are seen in any two epochs (Jordan 2024, sec. 3.6). Which half is read off the image: whether the sum of its pixels,
    as whole numbers, is odd.

    p: in [0, 1]; 0.5 with alternate; off_epoch: as for `Stage`. Raises ValueError outside.
    """

    def __init__(self, *, p: float = 0.5, alternate: bool = False, off_epoch: int | None = None) -> None:
        super().__init__(off_epoch=off_epoch)
        self._p, self._alternate = probability("p", p), alternate
        if alternate and p != 0.5:
            raise ValueError(f"p must be 0.5 where flips alternate, got {p}")

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other("flip", x)
        if self._alternate:
            mirrored = (x.long().sum((1, 2, 3), keepdim=True) + self.epoch) % 2 == 0
        else:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < self._p
        if is_picture("flip", x, y):
            y = torch.where(mirrored if y.dim() == 4 else mirrored[:, 0], y.flip(-1), y)
        return torch.where(mirrored, x.flip(3), x), y


class ShiftFlip(Stage):
    """`Flip`, then `Shift`: the standard for small images (He et al. 2015, sec. 4.2).

    pixels, padding: as for `Shift`; p, alternate: as for `Flip`; off_epoch: as for `Stage`.
    """

    def __init__(
        self,
        *,
        pixels: int = 2,
        p: float = 0.5,
        alternate: bool = False,
        padding: str = "black",
        off_epoch: int | None = None,
    ) -> None:
        super().__init__(off_epoch=off_epoch)
        self._shift, self._flip = Shift(pixels=pixels, padding=padding), Flip(p=p, alternate=alternate)

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other("shift_flip", x)
        self._flip.epoch = self.epoch
        return self._shift.change(*self._flip.change(x, y, num_classes), num_classes)

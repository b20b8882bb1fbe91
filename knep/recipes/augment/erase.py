"""Rectangles of images, hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knep.recipes.augment.base import Stage, probability, refuse_other, refuse_picture

__all__ = ["Erase"]

_MODES = ("black", "const", "rand", "pixel")


class Erase(Stage):
    """Blackens a random rectangle of each image with probability p (Zhong et al. 2017, algorithm 1, black fill).

    The rectangle's area is U(smallest, largest) of the image's, its aspect ratio log-uniform in [0.3, 1 / 0.3]. Other
    modes are timm's, which erases pixels that are standardised already: "const" fills with their mean colour, "rand"
    with one colour drawn from N(mean, deviation) for each rectangle, "pixel" with one for each pixel; mean and
    deviation are those of the batch, by channel. An image has U{1, ..., count} rectangles, which share its area. A side
    that would pass the border is cut to it, where timm draws again.

    p: in [0, 1]; smallest, largest: shares of the area, 0 < smallest <= largest < 1; mode: as above; count: at least 1;
    off_epoch: as for `Stage`. Raises ValueError outside.
    """

    def __init__(
        self,
        *,
        p: float = 0.25,
        smallest: float = 0.02,
        largest: float = 0.33,
        mode: str = "black",
        count: int = 1,
        off_epoch: int | None = None,
    ) -> None:
        super().__init__(off_epoch=off_epoch)
        if not 0 < smallest <= largest < 1:
            raise ValueError(f"smallest and largest must be 0 < smallest <= largest < 1, got {smallest} and {largest}")
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self._p, self._smallest, self._largest = probability("p", p), smallest, largest
        self._mode, self._count = mode, count

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other("erase", x)
        refuse_picture("erase", y, "augment=none")
        if self._count == 1:
            erased = torch.rand(5, len(x), device=x.device)
            return self._filled(x, self._rectangle(x, erased, 1) & (erased[4] < self._p)[:, None, None, None]), y
        u = torch.rand(2, len(x), device=x.device)
        each = (u[0] * self._count).floor() + 1
        x = x if self._mode == "black" or x.is_floating_point() else x.to(torch.get_default_dtype())
        colours = self._colours(x)
        for i in range(self._count):
            drawn = self._rectangle(x, torch.rand(4, len(x), device=x.device), each)
            x = self._filled(x, drawn & ((i < each) & (u[1] < self._p))[:, None, None, None], colours)
        return x, y

    def _rectangle(self, x: Tensor, u: Tensor, share: Tensor | int) -> Tensor:
        """Mask (N, 1, H, W) of a rectangle for each image; u: uniform draws (4 or more, N)."""
        height, width = x.shape[-2:]
        area = (self._smallest + (self._largest - self._smallest) * u[0]) * height * width / share
        aspect = torch.exp((2 * u[1] - 1) * -torch.log(torch.tensor(0.3, device=x.device)))
        h = (area * aspect).sqrt().round().clamp(1, height)
        w = (area / aspect).sqrt().round().clamp(1, width)
        return box(x, [(u[2] * (height - h + 1)).floor(), (u[3] * (width - w + 1)).floor()], [h, w])

    def _colours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the batch's pixels, (1, C, 1, 1)."""
        deviation, mean = torch.std_mean(x.to(torch.get_default_dtype()), (0, 2, 3), correction=0, keepdim=True)
        return mean, deviation

    def _filled(self, x: Tensor, hidden: Tensor, colours: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if self._mode == "black":
            return x.masked_fill(hidden, 0)
        mean, deviation = colours or self._colours(x)
        fill = mean
        if self._mode != "const":
            size = x.shape if self._mode == "pixel" else (*x.shape[:2], 1, 1)
            fill = mean + deviation * torch.randn(size, device=x.device)
        return torch.where(hidden, fill.to(x.dtype) if x.is_floating_point() else fill, x)


def box(x: Tensor, starts: Sequence[Tensor], sides: Sequence[Tensor]) -> Tensor:
    """Mask (N, 1, ...) of a box per image, the start and the length of each of its sides given as (N,)."""
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, (start, side) in enumerate(zip(starts, sides, strict=True), start=2):
        place = torch.arange(x.shape[axis], device=x.device)
        along = (place >= start[:, None]) & (place < (start + side)[:, None])
        inside = inside & along.reshape(len(x), 1, *(x.shape[i] if i == axis else 1 for i in range(2, x.dim())))
    return inside

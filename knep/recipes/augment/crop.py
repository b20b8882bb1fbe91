"""A random part of each image, resized: as weighted sums along both axes, all images of a batch at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from knep.recipes.augment.base import Stage, is_picture, refuse_other

__all__ = ["RandomResizedCrop"]

_TRIES = 10  # of torchvision, for a box that fits
_LARGE = 64 * 64  # pixels from which torchvision's bytes, image by image, are faster on a CPU; the same to one level


class RandomResizedCrop(Stage):
    """Resizes a random box of each image to the image's own size, or to `size` (Szegedy et al. 2015, sec. 6).

    Boxes are drawn as torchvision's `RandomResizedCrop` draws them: area U(scale) of the image's, aspect ratio
    log-uniform in `ratio`, ten tries, else the middle. Resampled with its antialiasing. A target that is an image
    follows by nearest neighbours.

    scale: 0 < least <= most <= 1; ratio: 0 < least <= most, width by height; size: pixels of a side, at least 1, None
    for the image's own; interpolation: "bilinear" or "bicubic"; off_epoch: as for `Stage`. Raises ValueError for
    others.
    """

    def __init__(
        self,
        *,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        size: int | None = None,
        interpolation: str = "bilinear",
        off_epoch: int | None = None,
    ) -> None:
        super().__init__(off_epoch=off_epoch)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the area, 0 < least <= most <= 1, got {list(scale)}")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be two numbers, 0 < least <= most, got {list(ratio)}")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1, or null for the image's own, got {size}")
        if interpolation not in _KERNELS:
            raise ValueError(f"interpolation must be one of {', '.join(_KERNELS)}, got {interpolation}")
        self._scale, self._ratio, self._size = tuple(scale), tuple(ratio), size
        self._kernel, self._interpolation = _KERNELS[interpolation], interpolation

    def sizes(self, whole: int) -> list[int]:
        return [self._size] if self._size not in (None, whole) else []

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other("random_resized_crop", x)
        height, width = x.shape[-2:]
        new = (height, width) if self._size is None else (self._size, self._size)
        top, left, h, w = crop_boxes(len(x), height, width, self._scale, self._ratio, x.device)
        if is_picture("random_resized_crop", x, y):
            y = _nearest(y, (top, h), (left, w), new)
        if x.device.type == "cpu" and x.dtype == torch.uint8 and height * width >= _LARGE:
            return self._one_by_one(x, torch.stack([top, left, h, w], 1).int().tolist(), new), y
        rows = self._weights(top, h, new[0], height)
        columns = self._weights(left, w, new[1], width)
        return resampled(x, rows, columns), y

    def _one_by_one(self, x: Tensor, boxes: list[list[int]], new: tuple[int, int]) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resized_crop

        kind = InterpolationMode(self._interpolation)
        parts = [
            resized_crop(image, top, left, h, w, list(new), kind, antialias=True)
            for image, (top, left, h, w) in zip(x, boxes, strict=True)
        ]
        return torch.stack(parts)

    def _weights(self, start: Tensor, length: Tensor, new: int, old: int) -> Tensor:
        """(N, new, old): of old pixels in each new one, for the stretch that begins at `start`, both (N,)."""
        scale = (length / new)[:, None, None]
        wide = scale.clamp_min(1)
        place = torch.arange(old, device=start.device) - start[:, None, None]
        middle = (torch.arange(new, device=start.device)[:, None] + 0.5) * scale
        weights = self._kernel((place + 0.5 - middle) / wide)
        inside = (place >= 0) & (place < length[:, None, None])
        weights = weights.masked_fill(~inside, 0)
        return weights / weights.sum(-1, keepdim=True)


def resampled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images (N, C, H, W) by weights rows (N, h, H) and columns (N, w, W), in the dtype of x: (N, C, h, w)."""
    out = rows[:, None] @ x.to(rows.dtype) @ columns[:, None].mT
    return out.to(x.dtype) if x.is_floating_point() else out.round_().clamp_(0, 255).to(x.dtype)


def crop_boxes(
    n: int, height: int, width: int, scale: Sequence[float], ratio: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width, each (N,), of boxes in whole pixels."""
    u = torch.rand(4, _TRIES, n, device=device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * u[1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = (u[2] * (height - h + 1)).floor(), (u[3] * (width - w + 1)).floor()
    first = fits.int().argmax(0, keepdim=True)  # the first try that fits, where there is one
    whole = _middle(height, width, ratio)
    found = [v.gather(0, first)[0] for v in (top, left, h, w)]
    some = fits.any(0)
    top, left, h, w = (torch.where(some, v, torch.full_like(v, m)) for v, m in zip(found, whole, strict=True))
    return top, left, h, w


def _middle(height: int, width: int, ratio: Sequence[float]) -> tuple[int, int, int, int]:
    """The largest box in the middle of the image whose aspect ratio is allowed."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _nearest(y: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], new: tuple[int, int]) -> Tensor:
    """A target (N, H, W) or (N, C, H, W) by its nearest pixels; rows, columns: start and length of the box."""
    places = [
        (start[:, None] + (torch.arange(size, device=y.device) * (length / size)[:, None]).floor()).long()
        for (start, length), size in zip((rows, columns), new, strict=True)
    ]
    image = torch.arange(len(y), device=y.device)[:, None, None]
    picked = (y if y.dim() == 3 else y.movedim(1, -1))[image, places[0][:, :, None], places[1][:, None, :]]
    return picked if y.dim() == 3 else picked.movedim(-1, 1)


def _triangle(t: Tensor) -> Tensor:
    return (1 - t.abs()).clamp_min(0)


def _cubic(t: Tensor) -> Tensor:
    """Keys 1981 with a = -1/2."""
    t = t.abs()
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _triangle, "bicubic": _cubic}

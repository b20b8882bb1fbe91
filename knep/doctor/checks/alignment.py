"""Masks that lie beside their images: moved by some pixels, mirrored, turned, or of the image before or behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from knep.doctor.findings import Finding, finding
from knep.doctor.subject.any_task import Subject

_ROWS, _CLASSES = 200, 8
_BETTER, _CLEAR = 1.5, 0.1  # times the correlation as it is, and the correlation that says something
_MENDED = "read images and masks in the same order, and give both the same crop, flip and resize"
_TURNED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "turned over left to right": lambda t: t.flip(2),
    "turned over top to bottom": lambda t: t.flip(1),
    "transposed": lambda t: t.transpose(1, 2),
    "turned by 180 degrees": lambda t: t.flip(1, 2),
    "turned by 90 degrees": lambda t: t.rot90(1, (1, 2)),
    "turned by 270 degrees": lambda t: t.rot90(3, (1, 2)),
    "of the image before": lambda t: t.roll(1, 0),
    "of the image behind": lambda t: t.roll(-1, 0),
}


def misaligned(subject: Subject) -> list[Finding]:
    """unrelated_labels where the classes of pixels fit the brightness of the images far better in another place."""
    seen = subject.stacked("train", _ROWS)
    if seen is None or subject.task not in ("segmentation", "binary"):
        return []
    x, y = seen
    y = y[:, 0] if y.ndim == 4 and y.shape[1] == 1 else y
    if x.ndim != 4 or y.ndim != 3 or x.shape[2:] != y.shape[1:] or not x.is_floating_point() or len(x) < 20:
        return []
    if min(y.shape[1:]) < 4:
        return []
    images, masks = _centred(x.float()), _of_classes(y)
    if not len(masks):
        return []
    own = _best(images, masks)
    found = {"as they are": own} | {
        name: _best(images, torch.stack([turn(m) for m in masks]))
        for name, turn in _TURNED.items()
        if turn(y).shape == y.shape
    }
    moved, (down, right) = _moved(images, masks)
    if max(abs(down), abs(right)) > 1:
        found[f"moved by {down} rows and {right} columns"] = moved
    name = max(found, key=lambda k: found[k])
    if found[name] < _CLEAR or found[name] < _BETTER * own + 0.3 / len(x) ** 0.5:
        return []
    text = f"the correlation between the masks and the brightness of the images is {own:.2g}, and {found[name]:.2g} "
    text += f"with the masks {name}"
    return [finding("unrelated_labels", text, 0.95, mend=_MENDED)]


def _centred(x: Tensor) -> Tensor:
    """(F, N, H, W) channels, and how far they are from their mean, each with its mean over images taken off."""
    both = torch.cat([x, (x - x.mean((0, 2, 3), keepdim=True)).abs()], 1).movedim(1, 0)
    return _unit(both - both.mean(1, keepdim=True))


def _of_classes(y: Tensor) -> Tensor:
    """(K, N, H, W) where each class but those that vary too little is, its mean over images taken off."""
    kinds, counts = y[y >= 0].unique(return_counts=True)
    usual = kinds[counts.argsort(descending=True)][:_CLASSES]
    masks = torch.stack([(y == k).float() for k in usual]) if len(usual) else torch.zeros(0, *y.shape)
    masks = masks - masks.mean(1, keepdim=True)
    return _unit(masks[masks.flatten(1).std(1, correction=0) > 1e-3])


def _unit(t: Tensor) -> Tensor:
    return t / t.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]


def _best(images: Tensor, masks: Tensor) -> float:
    return float((images.flatten(1) @ masks.flatten(1).T).abs().max())


def _moved(images: Tensor, masks: Tensor) -> tuple[float, tuple[int, int]]:
    """(the largest correlation at any shift of the images around their ends, (rows, columns) of that shift)."""
    a, b = torch.fft.rfft2(images), torch.fft.rfft2(masks)
    size = images.shape[-2:]
    maps = torch.stack([torch.fft.irfft2((a * m.conj()).sum(1), s=size) for m in b]).abs().amax((0, 1))
    at = int(maps.argmax())
    rows, columns = divmod(at, size[1])
    return float(maps.max()), tuple(v - n if v > n // 2 else v for v, n in zip((rows, columns), size, strict=True))  # pyright: ignore

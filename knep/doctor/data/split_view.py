"""A split as the model sees it: labels of every image, and of a few thousand images numbers and a small copy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.doctor.subject.batches import Batch
from knep.doctor.subject.setup import Patient

_IMAGES = 4000  # of a split that are looked at closely
_SIDE = 32  # pixels of the small copies
_FLAT = 1024  # numbers of the small copy of an input that is no image
IGNORED = -100  # the label that nn.CrossEntropyLoss passes over


@dataclass(frozen=True)
class Split:
    """Training or validation after scaling, in the order in which the run sees it.

    Of all N images: y int64 (N,); batch int64 (N,), the number of the batch; key: a digest of the raw image's bytes;
    broken: (batch, place in it) of images with NaN or infinity.
    Of n <= 4,000 finite images, spread evenly over the order: at int64 (n,), which of the N; mean, std (n, C), largest
    (n,) = max |x|, low, high float64 (C,) over all n; small float32 (n, C, h, w), averaged down to at most 32 pixels a
    side. Inputs of another shape than (N, C, H, W) count as one channel.
    """

    y: Tensor
    batch: Tensor
    key: tuple[bytes, ...]
    broken: tuple[tuple[int, int], ...]
    at: Tensor
    mean: Tensor
    std: Tensor
    largest: Tensor
    low: Tensor
    high: Tensor
    small: Tensor

    @property
    def labels(self) -> Tensor:
        """Of the n images, (n,)."""
        return self.y[self.at]

    @property
    def flat(self) -> Tensor:
        """The small copies (n, C*h*w)."""
        return self.small.flatten(1)

    def __len__(self) -> int:
        return len(self.at)


def split(patient: Patient, name: str, images: int = _IMAGES) -> Split | None:
    """`train` or `val` of the patient; None where there is no batch. Time: about 20 us an image of 28 x 28."""
    batches = patient.train if name == "train" else patient.val
    if not batches:
        return None
    sizes = [len(y) for _, y in batches]
    total = sum(sizes)
    chosen = evenly(total, images)
    parts, broken, first = [], [], 0
    shape = None
    for number, (x, _) in enumerate(batches):
        seen = as_images(patient.inputs(x).detach())
        finite = seen.flatten(1).isfinite().all(1)
        broken += [(number, place) for place in (~finite).nonzero().flatten().tolist()]
        here = chosen[(chosen >= first) & (chosen < first + len(x))] - first
        here = here[finite[here]]
        shape = shape or _small_shape(seen)
        if len(here):
            parts.append((here + first, *_numbers(seen[here], shape)))
        first += len(x)
    y = torch.cat([b[1] for b in batches]).cpu()
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Split(y, batch, _keys(batches), tuple(broken), *_joined(parts, shape or (1, 1, 1)))


def evenly(count: int, most: int) -> Tensor:
    """So many of `count` places, evenly, int64."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def as_images(x: Tensor) -> Tensor:
    """Any input (N, ...) as float32 (N, C, H, W) on the CPU."""
    x = x.float().cpu()
    if x.ndim == 4:
        return x
    return x[:, None] if x.ndim == 3 else x.reshape(len(x), 1, 1, -1)


def _small_shape(x: Tensor) -> tuple[int, int, int]:
    _, c, h, w = x.shape
    return (c, min(h, _SIDE), min(w, _SIDE)) if h > 1 else (c, 1, min(w, _FLAT))


def _numbers(x: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    pixels = x.double().flatten(2)
    small = x if x.shape[1:] == shape else F.adaptive_avg_pool2d(x, shape[1:])
    deviation = pixels.std(2, correction=0)
    return pixels.mean(2), deviation, pixels.abs().amax((1, 2)), pixels.amin((0, 2)), pixels.amax((0, 2)), small


def _joined(parts: Sequence[tuple[Tensor, ...]], shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    if not parts:
        channels = torch.zeros(0, shape[0], dtype=torch.float64)
        none = torch.zeros(shape[0], dtype=torch.float64)
        return torch.zeros(0).long(), channels, channels, channels[:, 0], none, none, torch.zeros(0, *shape)
    at, mean, std, largest, low, high, small = zip(*parts, strict=True)
    extremes = torch.stack(low).amin(0), torch.stack(high).amax(0)
    return torch.cat(at), torch.cat(mean), torch.cat(std), torch.cat(largest), *extremes, torch.cat(small)


def _keys(batches: Sequence[Batch]) -> tuple[bytes, ...]:
    keys = []
    for x, _ in batches:
        raw = x.detach().cpu().reshape(len(x), -1).contiguous().view(torch.uint8)
        keys += [hashlib.blake2b(image.numpy().data, digest_size=8).digest() for image in raw]
    return tuple(keys)

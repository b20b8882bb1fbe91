"""`scaling`: the range of the input. `f(batches) -> nn.Module`, applied to raw pixels 0..255 on the device.

batches: images (N, C, H, W) of the training split, which only `standardize` reads; validation and test are never seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["none", "standardize", "symmetric", "unit"]


class _Affine(nn.Module):
    """(x - shift) * scale in float32; both are buffers (1, C, 1, 1), so that a checkpoint carries them."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift.float().reshape(1, -1, 1, 1))
        self.register_buffer("scale", scale.float().reshape(1, -1, 1, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return (x_NCHW.to(self.shift.dtype) - self.shift) * self.scale


def none(batches: Iterable[Tensor] = ()) -> nn.Module:
    """Raw pixels, 0..255: x. What an unscaled input does to training can be seen with it."""
    return _Affine(torch.zeros(1), torch.ones(1))


def unit(batches: Iterable[Tensor] = ()) -> nn.Module:
    """Pixels to [0, 1]: x / 255."""
    return _Affine(torch.zeros(1), torch.tensor([1 / 255], dtype=torch.float64))


def symmetric(batches: Iterable[Tensor] = ()) -> nn.Module:
    """Pixels to [-1, 1]: (x - 127.5) / 127.5."""
    return _Affine(torch.tensor([127.5]), torch.tensor([1 / 127.5], dtype=torch.float64))


def standardize(batches: Iterable[Tensor]) -> nn.Module:
    """Mean 0 and variance 1 per channel over the training split: (x - mean) / std (LeCun et al. 1998, sec. 4.3).

    A channel without variance is shifted only. Raises ValueError where there is no image.
    """
    count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        x = batch.double()
        count += x.shape[0] * x.shape[2] * x.shape[3]
        total = total + x.sum((0, 2, 3)).cpu()
        squares = squares + x.square().sum((0, 2, 3)).cpu()
    if not count:
        raise ValueError("standardize needs training images, and got none")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    # Rounding leaves a constant channel with a tiny deviation that would blow it up.
    return _Affine(mean, torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std, torch.ones_like(std)))

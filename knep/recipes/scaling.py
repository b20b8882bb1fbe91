"""`scaling`: the range of the input. `f(batches) -> nn.Module`, applied to raw pixels 0..255 on the device.

batches: images (N, C, H, W) of the training split, which only `standardize` reads; validation and
test are never seen.
Any other (N, ...) keeps its shape; `standardize` takes its axis 1 for the channels: the features of a table (N, F), the
channels of a signal (N, C, L). Tokens are refused with InputError, but by `none`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from knep.errors import InputError

__all__ = ["none", "standardize", "symmetric", "unit"]

_TOKENS = (torch.int32, torch.int64)


class _Affine(nn.Module):
    """(x - shift) * scale in float32; both are buffers (1, C, 1, 1), so that a checkpoint carries them.

    x: (N, C, H, W), or any other (N, ...) with the channels on axis 1; its shape stays. Whole numbers of 32 bits or
    more are tokens or classes, not pixels, and are refused.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift.float().reshape(1, -1, 1, 1))
        self.register_buffer("scale", scale.float().reshape(1, -1, 1, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if x_NCHW.dim() == 4 and x_NCHW.dtype not in _TOKENS:
            return (x_NCHW.to(self.shift.dtype) - self.shift) * self.scale
        _refuse_tokens(x_NCHW)
        channels = [1, -1, *[1] * (x_NCHW.dim() - 2)] if x_NCHW.dim() > 1 else [-1]
        return (x_NCHW.to(self.shift.dtype) - self.shift.reshape(channels)) * self.scale.reshape(channels)


class _Raw(_Affine):
    """Pixels as they are, in float32; tokens stay whole numbers."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW if x_NCHW.dtype in _TOKENS else super().forward(x_NCHW)


def _refuse_tokens(x: Tensor) -> None:
    if x.dtype in _TOKENS:
        dtype = str(x.dtype).removeprefix("torch.")
        raise InputError(
            f"the input is {dtype} {tuple(x.shape)}, numbers of tokens, which no scaling fits: scaling=none"
        )


def none(batches: Iterable[Tensor] = ()) -> nn.Module:
    """Raw pixels, 0..255: x. What an unscaled input does to training can be seen with it."""
    return _Raw(torch.zeros(1), torch.ones(1))


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
        _refuse_tokens(batch)
        x = batch.double() if batch.dim() > 1 else batch.double()[:, None]
        others = (0, *range(2, x.dim()))
        count += x.numel() // x.shape[1]
        total = total + x.sum(others).cpu()
        squares = squares + x.square().sum(others).cpu()
    if not count:
        raise ValueError("standardize needs training images, and got none")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    # Rounding leaves a constant channel with a tiny deviation that would blow it up.
    return _Affine(mean, torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std, torch.ones_like(std)))

"""What an init puts into a residual branch: a factor on it, a number before a layer."""

import torch
from torch import Tensor, nn


class BranchScale(nn.Module):
    """x * scale: one trained number, or one for each channel, or a constant.

    x: of any shape; scale: the first value; channels: how many numbers, 1 for one of all; axis: of the channels, -1 or
    1, in x. trained: False keeps it as it is, in a buffer.
    """

    scale: Tensor

    def __init__(self, scale: float, channels: int = 1, axis: int = -1, trained: bool = True) -> None:
        super().__init__()
        self.axis = axis
        value = torch.full((channels,), float(scale))
        if trained:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.to(x.dtype)  # under autocast the branch stays in half precision, as its sum does
        return x * (scale if self.axis == -1 else scale.view(-1, *(1 for _ in range(x.dim() - 2))))

    def extra_repr(self) -> str:
        return f"channels={len(self.scale)}, axis={self.axis}"


class Shift(nn.Module):
    """x + bias, one trained number that begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.to(x.dtype)

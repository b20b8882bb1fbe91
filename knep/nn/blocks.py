"""What models are built of: convolution, norm, activation, with places for the slots."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from knep.nn.place import Place

Norm = Callable[[int], nn.Module]

Activation = Callable[[], nn.Module]


def norm_at(norm: Norm | None, features: int) -> nn.Module:
    """The norm for `features` channels, or the place where the norm slot puts one."""
    return Place("norm", features) if norm is None else norm(features)


def conv_unit(
    channels_in: int, channels: int, kernel: int, *, norm: Norm | None, activation: Activation, stride: int = 1
) -> nn.Sequential:
    """(N, channels_in, H, W) to (N, channels, H/stride, W/stride): convolution, norm, activation.

    The convolution has a bias only where a place is left; the norm that fills the place takes it away.
    """
    conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=norm is None)
    parts = {
        "conv": conv,
        "norm": norm_at(norm, channels),
        "act": activation(),
        "norm_after": Place("norm_after", channels),
    }
    return nn.Sequential(OrderedDict(parts))


class Copy(nn.Module):
    """Hands on a copy: what changes it in place leaves the original, which a backward pass may need."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()

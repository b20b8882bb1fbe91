"""A small U-net: a class for each pixel, from what is near and from what lies around."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knep.errors import InputError
from knep.nn.blocks import Activation, Norm, conv_unit
from knep.nn.place import Place


def _stage(channels_in: int, channels: int, norm: Norm | None, activation: Activation) -> nn.Sequential:
    units = [conv_unit(n, channels, 3, norm=norm, activation=activation) for n in (channels_in, channels)]
    return nn.Sequential(*units, Place("features", channels))


class UNet(nn.Module):
    """Stages that halve the image, stages that double it again beside what was there, a 1x1 classifier. See `unet`."""

    def __init__(self, in_channels: int, num_classes: int, widths: Sequence[int], norm: Norm | None, act: Activation):
        super().__init__()
        self.down = nn.ModuleList(_stage(a, b, norm, act) for a, b in pairwise((in_channels, *widths)))
        self.pool = nn.MaxPool2d(2)
        upward = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(_stage(below + beside, beside, norm, act) for below, beside in upward)
        self.dropout = Place("head", widths[0])
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else self.pool(x))
            seen.append(x)
        for stage, beside in zip(self.up, reversed(seen[:-1]), strict=True):
            x = F.interpolate(x, size=beside.shape[2:])  # nearest; odd sizes come back as they were
            x = stage(torch.cat([beside, x], dim=1))
        return self.classifier(self.dropout(x))


def unet(
    in_channels: int,
    num_classes: int,
    image_size: int,
    *,
    widths: Sequence[int] = (32, 64, 128),
    norm: Norm | None = None,
    activation: Activation = nn.ReLU,
) -> UNet:
    """Images (N, in_channels, H, W) to scores (N, num_classes, H, W), a class for each pixel (Ronneberger et al. 2015).

    Two 3x3 convolutions a stage, padded so that the size stays; pooling downward, nearest neighbours and the signal of
    the same size beside them upward. Places: norm and norm_after behind each convolution, features behind each stage,
    head before the classifier.

    widths: channels of each stage, which halves the image; the last is the deepest. norm: None leaves the places.
    Raises InputError for widths that are not positive whole numbers, or more of them than the image can be halved.
    """
    if not widths or not all(isinstance(w, int) and w > 0 for w in widths):
        raise InputError(f"widths must be positive whole numbers such as [32,64,128], got {list(widths)}")
    if image_size >> (len(widths) - 1) < 1:
        raise InputError(
            f"widths must have at most {image_size.bit_length()} stages for image_size={image_size}, which each but "
            f"the first halves: got {list(widths)}"
        )
    return UNet(in_channels, num_classes, tuple(widths), norm, activation)

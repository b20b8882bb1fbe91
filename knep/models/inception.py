"""A small Inception net: each block looks at its input through windows of several sizes at once."""

import torch
from torch import Tensor, nn

from knep.errors import InputError
from knep.nn.blocks import Activation, Norm, conv_unit
from knep.nn.place import Place
from knep.utils.validation import check

# Output channels of the stem and of the blocks; between stages the image is halved.
_STEM = 32
_STAGES = ((64,), (128, 192), (256, 384))


def _units(units: list[tuple[int, int, int]], norm: Norm | None, activation: Activation) -> nn.Sequential:
    return nn.Sequential(*(conv_unit(*unit, norm=norm, activation=activation) for unit in units))


class InceptionBlock(nn.Module):
    """(N, channels_in, H, W) to (N, channels, H, W): 1x1, 3x3, 5x5 and pooling branches side by side.

    The larger windows read a 1x1 reduction of the input. Shares of the output: 1/4, 1/2, 1/8 and 1/8, near those of
    GoogLeNet (Szegedy et al. 2015, table 1).
    """

    def __init__(self, channels_in: int, channels: int, norm: Norm | None, activation: Activation) -> None:
        super().__init__()
        eighth = channels // 8
        rest = channels - 2 * eighth - channels // 2
        self.branch1 = _units([(channels_in, rest, 1)], norm, activation)
        self.branch3 = _units([(channels_in, 2 * eighth, 1), (2 * eighth, channels // 2, 3)], norm, activation)
        half = max(1, eighth // 2)
        self.branch5 = _units([(channels_in, half, 1), (half, eighth, 5)], norm, activation)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.branch_pool = _units([(channels_in, eighth, 1)], norm, activation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """Stem, stages of Inception blocks with pooling between them, mean over all pixels, classifier. See `inception`."""

    def __init__(
        self,
        stem: nn.Sequential,
        channels: int,
        stages: list[list[int]],
        num_classes: int,
        norm: Norm | None,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential()
        for i, widths in enumerate(stages):
            stage = nn.Sequential()
            for width in widths:
                stage.append(InceptionBlock(channels, width, norm, activation))
                channels = width
            if i < len(stages) - 1:
                stage.append(nn.MaxPool2d(3, stride=2, padding=1))
            stage.append(Place("features", channels))
            self.stages.append(stage)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = Place("head", channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        return self.classifier(self.dropout(self.pool(x).flatten(1)))


def inception(
    in_channels: int,
    num_classes: int,
    image_size: int,
    *,
    width: float = 1.0,
    norm: Norm | None = nn.BatchNorm2d,
    activation: Activation = nn.ReLU,
) -> Inception:
    """Images (N, in_channels, image_size, image_size) to class scores (N, num_classes) through Inception blocks
    (Szegedy et al. 2015), five of them in three stages: GoogLeNet's plan at a twelfth of its size.

    Above 96 pixels the stem is a 7x7 convolution with stride 2 and max pooling, else a 3x3 convolution.
    Places: norm and norm_after behind each convolution, features behind each stage, head before the classifier.

    width: factor on all channels. norm: None leaves the places.
    Raises InputError for a width that leaves a block fewer than 8 channels, one for its thinnest branches.
    """
    check("width", width, "(0, inf)")
    stages = [[round(width * c) for c in stage] for stage in _STAGES]
    if stages[0][0] < 8:
        raise InputError(f"width must leave each block at least 8 of its {_STAGES[0][0]} channels, got {width}")
    channels = max(1, round(_STEM * width))
    large = image_size > 96
    unit = conv_unit(
        in_channels, channels, 7 if large else 3, stride=2 if large else 1, norm=norm, activation=activation
    )
    parts = [unit, nn.MaxPool2d(3, stride=2, padding=1)] if large else [unit]
    return Inception(nn.Sequential(*parts), channels, stages, num_classes, norm, activation)

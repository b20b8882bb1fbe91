"""A plain convolutional net: the first one of every tutorial, and with more convolutions per stage a small VGG."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from knep.errors import InputError
from knep.nn.blocks import Activation, Norm, conv_unit
from knep.nn.place import Place
from knep.utils.validation import whole


class CNN(nn.Module):
    """Stages of convolutions and pooling, then a linear classifier on all pixels left. See `cnn`."""

    def __init__(
        self,
        channels: Sequence[int],
        convs: int,
        pool: str,
        pixels: int,
        num_classes: int,
        norm: Norm | None,
        act: Activation,
    ):
        super().__init__()
        self.stages = nn.Sequential()
        for before, width in pairwise(channels):
            units: list[nn.Module] = [
                conv_unit(n, width, 3, norm=norm, activation=act) for n in (before, *[width] * (convs - 1))
            ]
            units.insert(1 if pool == "first" else convs, nn.MaxPool2d(2))
            self.stages.append(nn.Sequential(*units, Place("features", width)))
        self.dropout = Place("head", channels[-1] * pixels)
        self.classifier = nn.Linear(channels[-1] * pixels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.stages(x).flatten(1)))


def cnn(
    in_channels: int,
    num_classes: int,
    image_size: int,
    *,
    widths: Sequence[int] = (32, 64),
    convs: int = 1,
    pool: str = "last",
    norm: Norm | None = None,
    activation: Activation = nn.ReLU,
) -> CNN:
    """Images (N, in_channels, image_size, image_size) to class scores (N, num_classes): stages of 3x3 convolutions,
    each ending in 2x2 max pooling, then a linear layer on what is left (LeCun et al. 1998, with today's parts).

    Places: norm and norm_after behind each convolution, features behind each pooling, head before the classifier.

    widths: channels of each stage, which halves the image; convs: convolutions per stage, from 1 on; two or more make
    it a small VGG (Simonyan and Zisserman 2015); pool: "last" in a stage, or "first", behind its first convolution,
    which leaves the others a quarter of the pixels. norm: None leaves the places.
    Raises InputError for widths or convs that are not positive whole numbers, an unknown pool, or more stages than the
    image can be halved.
    """
    whole("convs", convs, 1)
    if pool not in ("first", "last"):
        raise InputError(f"pool must be first or last, got {pool}")
    if not widths or not all(isinstance(w, int) and w > 0 for w in widths):
        raise InputError(f"widths must be positive whole numbers such as [32,64], got {list(widths)}")
    side = image_size >> len(widths)
    if side < 1:
        most = image_size.bit_length() - 1
        raise InputError(
            f"widths must have at most {most} stages for image_size={image_size}, which each stage halves: "
            f"got {list(widths)}"
        )
    return CNN((in_channels, *widths), convs, pool, side**2, num_classes, norm, activation)

"""Fully connected nets, for vectors and small images."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from knep.errors import InputError
from knep.nn.blocks import Activation, Norm, norm_at
from knep.nn.place import Place


def _layer(features_in: int, features: int, norm: Norm | None, activation: Activation) -> nn.Sequential:
    parts = {
        "linear": nn.Linear(features_in, features, bias=norm is None),
        "norm": norm_at(norm, features),
        "act": activation(),
        "norm_after": Place("norm_after", features),
    }
    return nn.Sequential(OrderedDict(parts))


class MLP(nn.Module):
    """Layers of linear, norm, activation; then a linear classifier. See `mlp`."""

    def __init__(self, features_in: int, widths: Sequence[int], num_classes: int, norm: Norm | None, act: Activation):
        super().__init__()
        self.layers = nn.Sequential()
        for i, (before, width) in enumerate(zip([features_in, *widths], widths, strict=False), start=1):
            layer = _layer(before, width, norm, act)
            if i < len(widths):
                layer.append(Place("hidden", width))
            self.layers.append(layer)
        features = widths[-1] if widths else features_in
        self.dropout = Place("head", features)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.layers(x.flatten(1))))


def mlp(
    in_channels: int,
    num_classes: int,
    image_size: int,
    *,
    widths: Sequence[int] = (512, 256),
    norm: Norm | None = None,
    activation: Activation = nn.ReLU,
) -> MLP:
    """Images (N, in_channels, image_size, image_size) to class scores (N, num_classes) through hidden layers.

    Sees no neighbourhood: a shuffle of the pixels, the same for all images, changes nothing (Rumelhart et al. 1986).
    Places: norm, norm_after and hidden in each layer; head, in place of hidden, behind the last.

    widths: units of each hidden layer; none at all is softmax regression. norm: None leaves the places.
    Raises InputError for a width that is not a positive whole number.
    """
    if not all(isinstance(w, int) and w > 0 for w in widths):
        raise InputError(f"widths must be positive whole numbers such as [512,256], got {list(widths)}")
    return MLP(in_channels * image_size**2, tuple(widths), num_classes, norm, activation)

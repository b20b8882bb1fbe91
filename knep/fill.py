"""Giving weights new values: what the `init` slot is made of.

Covered are `nn.Linear` and all convolutions, grouped and transposed ones included, with their weights trained. Biases
are set to 0. Norms, embeddings, attention's packed projections and frozen weights keep what they have.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from knep.errors import InputError
from knep.surgery import Change, required


class Fans(NamedTuple):
    """Inputs that one output of a layer sums over, and outputs that one input reaches."""

    n_in: int
    n_out: int


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution; 1 for a linear layer."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


def fans(layer: nn.Module, weight: Tensor) -> Fans:
    """Fans of a linear layer or convolution: channels of one group x taps. Strides and padding do not count.

    weight: (out, in), (out, in / groups, taps ...) or, transposed, (in, out / groups, taps ...).
    """
    taps = weight[0, 0].numel()
    rows, columns = weight.shape[0] // groups_of(layer) * taps, weight.shape[1] * taps
    transposed = isinstance(layer, _ConvNd) and layer.transposed
    return Fans(rows, columns) if transposed else Fans(columns, rows)


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every covered layer whose weight is trained; a weight shared by several layers once."""
    seen: set[int] = set()
    for path, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, _ConvNd)):
            stored = next((p for name, p in layer.named_parameters() if "weight" in name), None)
            if stored is not None and stored.requires_grad and id(stored) not in seen:
                seen.add(id(stored))
                yield path, layer


def assign(path: str, layer: Any, weight: Tensor) -> None:
    """Put `weight` in the layer; through its parametrization (weight or spectral normalization) where it has one.

    Weight normalization then computes with exactly these values; spectral normalization with these, divided by their
    spectral norm. Raises InputError for a parametrization that cannot be inverted.
    """
    if not is_parametrized(layer, "weight"):
        with torch.no_grad():
            layer.weight.copy_(weight)
        return
    try:
        layer.weight = weight
    except (NotImplementedError, RuntimeError) as error:
        kinds = ", ".join(type(p).__name__ for p in layer.parametrizations.weight)
        raise InputError(f"init cannot set {path}.weight through its parametrization {kinds}: use init=none") from error


def fill(model: nn.Module, name: str, rule: Callable[[Any, Tensor], Any]) -> list[Change]:
    """Give each covered layer a weight that rule(layer, weight) writes into a fresh tensor, and a bias of 0.

    Drawn from torch's global generator of the weight's device. Raises NoEffectError when no layer is covered.
    """
    changes = []
    for path, layer in weighted_layers(model):
        before = layer.weight.detach()
        weight = torch.empty_like(before)
        with torch.no_grad():
            rule(layer, weight)
            changes.append(Change(f"{path}.weight".lstrip("."), f"rms {rms(before)}", f"{name}, rms {rms(weight)}"))
            assign(path, layer, weight)
            if layer.bias is not None:
                layer.bias.zero_()
    return required(changes, "init", "the model has no trained weights of linear layers or convolutions")


def rms(weight: Tensor) -> str:
    """Root mean square of the elements, four digits."""
    return f"{weight.square().mean().sqrt().item():.4g}"

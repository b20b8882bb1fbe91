"""Giving weights new values: what the `init` slot is made of.

Covered are the trained weights of `nn.Linear`, all convolutions (grouped and transposed ones included), `nn.Bilinear`,
`nn.Embedding`, and the packed projections of `nn.MultiheadAttention`, which are three matrices in one. Their biases are
set to 0. A weight that several layers share is drawn once, for the layer that sums over most inputs. Norms keep what
they have; any other parameter of two axes or more is listed as left as it is, with the reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from knep.errors import InputError
from knep.nn.kinds import is_norm
from knep.surgery.edit import Change, bare, required

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Fans(NamedTuple):
    """Inputs that one output of a layer sums over, and outputs that one input reaches."""

    n_in: int
    n_out: int


@dataclass(frozen=True)
class Weight:
    """A weight that an init draws: the layer's path, the layer, the attribute, and of how many matrices it is made."""

    path: str
    layer: Any
    attribute: str = "weight"
    parts: int = 1

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}".lstrip(".")

    @property
    def bias(self) -> str:
        """The attribute of the bias that belongs to the weight."""
        return "bias" if self.attribute == "weight" else "in_proj_bias"

    @property
    def value(self) -> Tensor:
        return getattr(self.layer, self.attribute).detach()

    @property
    def stored(self) -> nn.Parameter | None:
        """The parameter that training changes, below a parametrization; None where the weight is computed otherwise."""
        if is_parametrized(self.layer, self.attribute):
            return next(self.layer.parametrizations[self.attribute].parameters(), None)
        own = self.layer._parameters.get(self.attribute)
        return (
            own
            if own is not None
            else self.layer._parameters.get(f"{self.attribute}_v", self.layer._parameters.get(f"{self.attribute}_orig"))
        )


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution; 1 for any other layer."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


def fans(layer: nn.Module, weight: Tensor) -> Fans:
    """Fans of a layer: channels of one group x taps of a convolution. Strides and padding do not count.

    weight: (out, in), (out, in / groups, taps ...) or, transposed, (in, out / groups, taps ...); of a bilinear layer
    (out, in 1, in 2), summed over all pairs; of an embedding (words, out), where one word alone is read.
    """
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return Fans(1, weight.shape[1])
    taps = weight[0, 0].numel()
    rows, columns = weight.shape[0] // groups_of(layer) * taps, weight.shape[1] * taps
    transposed = isinstance(layer, _ConvNd) and layer.transposed
    return Fans(rows, columns) if transposed else Fans(columns, rows)


def _weights_of(path: str, layer: nn.Module) -> list[Weight]:
    if isinstance(layer, (nn.Linear, _ConvNd, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)):
        return [Weight(path, layer)]
    if isinstance(layer, nn.MultiheadAttention):
        names = [name for name in _PROJECTIONS if getattr(layer, name, None) is not None]
        return [Weight(path, layer, name, 3 if name == "in_proj_weight" else 1) for name in names]
    return []


def covered(model: nn.Module) -> Iterator[Weight]:
    """Every weight that an init draws, in module order; one shared by several layers once.

    Raises InputError, naming it, for a weight that is quantised or complex.
    """
    chosen: dict[int, Weight] = {}
    for path, layer in model.named_modules():
        if type(layer).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise InputError(
                f"init cannot draw {path or 'the model'}, {type(layer).__name__} is quantised: use init=none"
            )
        for weight in _weights_of(path, layer):
            stored = weight.stored
            if stored is None or not stored.requires_grad:
                continue
            if not stored.is_floating_point():
                raise InputError(f"init cannot draw {weight.name} of {stored.dtype}: use init=none")
            old = chosen.get(id(stored))
            if old is None or _n_in(weight) > _n_in(old):
                chosen[id(stored)] = weight
    yield from chosen.values()


def _n_in(weight: Weight) -> int:
    return fans(weight.layer, weight.value).n_in


def assign(weight: Weight, value: Tensor) -> None:
    """Give the weight this value; through its parametrization (weight or spectral normalization) where it has one.

    Weight normalization then computes with exactly these values; spectral normalization with these, divided by their
    spectral norm. Raises InputError for a parametrization that cannot be inverted.
    """
    layer, attribute = weight.layer, weight.attribute
    if not is_parametrized(layer, attribute):
        if weight.stored is not getattr(layer, attribute):
            raise InputError(f"init cannot set {weight.name}, a hook computes it: use torch.nn.utils.parametrizations")
        with torch.no_grad():
            getattr(layer, attribute).copy_(value)
        return
    try:
        setattr(layer, attribute, value)
    except (NotImplementedError, RuntimeError) as error:
        kinds = ", ".join(type(p).__name__ for p in layer.parametrizations[attribute])
        raise InputError(f"init cannot set {weight.name} through its parametrization {kinds}: use init=none") from error


def fill(model: nn.Module, name: str, rule: Callable[[Any, Tensor], Any]) -> list[Change]:
    """Give each covered weight values that rule(layer, matrix) writes into a fresh tensor, and each bias 0.

    Drawn from torch's global generator of the weight's device. Parameters that are left are listed behind. Raises
    NoEffectError when no weight is covered.
    """
    model = bare(model)
    changes, drawn = [], list(covered(model))
    for weight in drawn:
        before = weight.value
        value = torch.empty_like(before)
        with torch.no_grad():
            for matrix in value.chunk(weight.parts):
                rule(weight.layer, matrix)
            padding = getattr(weight.layer, "padding_idx", None)
            if padding is not None:
                value[padding] = 0
            changes.append(Change(weight.name, f"rms {rms(before)}", f"{name}, rms {rms(value)}"))
            assign(weight, value)
            bias = getattr(weight.layer, weight.bias, None)
            if bias is not None and bias.requires_grad:
                bias.zero_()
    required(changes, "init", "the model has no trained weights of linear layers, convolutions or embeddings")
    return changes + _left(model, drawn)


def _left(model: nn.Module, drawn: list[Weight]) -> list[Change]:
    """The parameters of two axes or more that keep their values, norms aside, each with the reason."""
    done = {id(p) for weight in drawn for p in _behind(weight)}
    changes = []
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if p.dim() > 1 and id(p) not in done and not is_norm(owner):
            why = "frozen" if not p.requires_grad else f"{type(owner).__name__} is no layer that init knows"
            changes.append(Change(name, f"rms {rms(p.detach())}", f"left as it is: {why}"))
    return changes


def _behind(weight: Weight) -> list[nn.Parameter]:
    """The parameters that the weight is computed of."""
    if is_parametrized(weight.layer, weight.attribute):
        return list(weight.layer.parametrizations[weight.attribute].parameters())
    return [] if weight.stored is None else [weight.stored]


def rms(weight: Tensor) -> str:
    """Root mean square of the elements, four digits; "unknown" on the meta device, which has shapes alone."""
    if weight.is_meta:
        return "unknown"
    return f"{weight.abs().square().mean().sqrt().item():.4g}"

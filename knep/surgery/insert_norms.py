"""Norm layers for a model that has none: behind each linear layer and convolution that an activation follows."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from knep.errors import InputError
from knep.nn.kinds import ACTIVATIONS
from knep.surgery.edit import Change, describe, modules_of, replace, required, text
from knep.surgery.record import classifier_of
from knep.surgery.watch import FUNCTIONS, hidden_gates, watch

_WEIGHTED = (nn.Linear, _ConvNd)


def insert(model: nn.Module, sample: Tensor | None, make: Callable[..., nn.Module], name: str) -> list[Change]:
    """Puts `make(path, layer, axis, shape, shapes)` behind each layer whose output an activation reads at every call.

    Not behind the classifier. Where the norm makes no sense, as instance norm behind a linear layer, the layer is left
    and listed so. A forward on `sample` shows what reads what, or else torch.fx: InputError where the model cannot be
    traced either.
    """
    followed = _followed_on(model, sample) if sample is not None else _followed_in_graph(model, name)
    last = classifier_of(model, sample)
    wrapped: dict[nn.Module, nn.Module] = {}
    changes, left = [], []
    for path, old in list(modules_of(model, *_WEIGHTED)):
        if old not in followed or old is last:
            continue
        try:
            if old not in wrapped:
                wrapped[old] = _with_norm(old, make(path, old, *_channels(old, followed[old]), followed[old]))
        except InputError as error:
            left.append(Change(path, describe(old), f"no norm behind it: {error}"))
            continue
        changes.append(Change(path, describe(old), text(wrapped[old])))
        replace(model, path, wrapped[old])
    why = left[0].after if left else "no linear layer or convolution but the classifier is followed by an activation"
    return required(changes, name, why) + left


def _with_norm(layer: Any, norm: nn.Module) -> nn.Module:
    norm.to(device=layer.weight.device, dtype=layer.weight.dtype).train(layer.training)
    return nn.Sequential(OrderedDict(layer=layer, norm=norm))


def _channels(layer: Any, shapes: list[torch.Size]) -> tuple[str, list[int]]:
    """(axis, channels) of a layer's output; the last axis is right for a linear layer's whatever its shape."""
    if isinstance(layer, nn.Linear):
        flat = bool(shapes) and all(len(shape) == 2 for shape in shapes)
        return "first" if flat else "last", [layer.out_features]
    return "first", [layer.out_channels]


def _followed_on(model: nn.Module, sample: Tensor) -> dict[nn.Module, list[torch.Size]]:
    """layer -> the shapes of its output, for the layers whose output goes straight into an activation at every call."""
    seen, functions = watch(model, sample)
    hidden = hidden_gates(seen)
    read = {id(c.input) for c in seen if isinstance(c.module, ACTIVATIONS) or c.module in hidden}
    read |= {id(c.input) for c in functions if issubclass(FUNCTIONS[c.function], ACTIVATIONS)}
    shapes, others = defaultdict(list), set()
    for call in seen:
        if isinstance(call.module, _WEIGHTED):
            shapes[call.module].append(call.output.shape)
            if id(call.output) not in read:
                others.add(call.module)
    return {module: found for module, found in shapes.items() if module not in others}


def _followed_in_graph(model: nn.Module, name: str) -> dict[nn.Module, list[torch.Size]]:
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # a user's forward can raise anything on the tracer's stand-ins
        raise InputError(f"{name} with insert=true needs sample=, a batch: the model cannot be traced") from error
    followed, others = set(), set()
    for node in graph.nodes:
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, _WEIGHTED):
            (followed if any(_is_activation(model, user) for user in node.users) else others).add(layer)
    return {layer: [] for layer in followed - others}


def _is_activation(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), ACTIVATIONS)
    function: Any = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    return issubclass(FUNCTIONS.get(function, nn.Module), ACTIVATIONS)

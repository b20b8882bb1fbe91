"""What a model is run on, for whoever looks at it: one batch, and how the model takes it. `call` alone runs it.

A tensor is the one argument; a tuple holds positional arguments, a dict keyword arguments; a list is one argument, as
detection nets take one, or positional ones where the forward needs several. Where the forward does not take them so,
each of these is one argument. Anything else is said by a function of the model and the value (`Sample.forward`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Sample:
    """A batch with what the batch alone does not say.

    forward: runs the model on the value, `forward(model, value)`; None for the model's own call.
    whole: a tensor is never cut to its first rows, as where each row belongs to a node of one graph.
    spread: whether a list, tuple or dict holds several arguments; None where the forward's signature says so.
    """

    value: Any
    forward: Callable[[nn.Module, Any], Any] | None = None
    whole: bool = False
    spread: bool | None = None


Inputs = Tensor | Sequence[Any] | Mapping[str, Any] | Sample


def sampled(inputs: Inputs) -> Sample:
    """The inputs as a `Sample`."""
    return inputs if isinstance(inputs, Sample) else Sample(inputs)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for the inputs, in the mode that it is in."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    sample = sampled(inputs)
    if sample.forward is not None:
        return sample.forward(model, sample.value)
    args, kwargs = _arguments(model, sample.value, sample.spread)
    return model(*args, **kwargs)


def tensors(inputs: Inputs) -> list[Tensor]:
    """All tensors among the inputs, at any depth."""
    value = inputs.value if isinstance(inputs, Sample) else inputs
    return [t for t in pytree.tree_leaves(_plain(value)) if isinstance(t, Tensor)]


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with every tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Sample):
        return replace(inputs, value=mapped(inputs.value, change))
    return pytree.tree_map(lambda t: change(t) if isinstance(t, Tensor) else t, _plain(inputs))


def like(model: nn.Module, inputs: Any) -> Any:
    """The inputs on the model's device and, what is not of whole numbers, in the model's dtype."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return inputs
    return mapped(inputs, lambda t: t.to(device=first.device, dtype=first.dtype if t.is_floating_point() else None))


def rows(inputs: Inputs, count: int = 2) -> Inputs:
    """The first rows of a tensor; anything else, whose parts may belong together in other ways, as it is."""
    value = inputs.value if isinstance(inputs, Sample) else inputs
    if not isinstance(value, Tensor) or value.dim() == 0 or (isinstance(inputs, Sample) and inputs.whole):
        return inputs
    return replace(inputs, value=value[:count]) if isinstance(inputs, Sample) else value[:count]


def ready(model: nn.Module, inputs: Inputs) -> Inputs:
    """Two images of the inputs, as the model reads them."""
    return like(model, rows(inputs))


def doubled(inputs: Inputs) -> Inputs:
    """A tensor of one image twice, since batch norm trains on two at least; any other inputs as they are."""
    value = inputs.value if isinstance(inputs, Sample) else inputs
    if not isinstance(value, Tensor) or len(value) != 1 or (isinstance(inputs, Sample) and inputs.whole):
        return inputs
    twice = torch.cat([value, value])
    return replace(inputs, value=twice) if isinstance(inputs, Sample) else twice


def told(inputs: Inputs) -> str:
    """The inputs on one line: "of shape (4, 3)", or their parts with dtype and shape."""
    value = inputs.value if isinstance(inputs, Sample) else inputs
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)


def shown(value: Any) -> str:
    """A value by its kind: "float32 (4, 3)" for a tensor, the parts of a container, the class of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)) and 0 < len(value) < 5:
        return f"({', '.join(map(shown, value))})"
    return type(value).__name__


def _plain(value: Any) -> Any:
    """A dict for any mapping, such as Hugging Face's BatchEncoding, which pytree takes for a leaf."""
    return dict(value) if isinstance(value, Mapping) and type(value) is not dict else value


def _arguments(model: nn.Module, value: Any, spread: bool | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(value, Mapping):
        named = {str(key): part for key, part in value.items()}
        several = _takes(model, (), named, True) if spread is None else spread
        return ((), named) if several else ((value,), {})
    if isinstance(value, (tuple, list)):
        several = isinstance(value, tuple) or _needs_several(model)
        several = several and _takes(model, tuple(value), {}, isinstance(value, tuple)) if spread is None else spread
        return (tuple(value), {}) if several else ((value,), {})
    return (value,), {}


def _takes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], unknown: bool) -> bool:
    """Whether the forward takes these arguments; `unknown` where its signature is not to be had."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return unknown
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _needs_several(model: nn.Module) -> bool:
    try:
        given = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in plain and p.default is p.empty for p in given) > 1

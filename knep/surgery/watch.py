"""One forward on a sample, watched: the calls of modules, and the activations that are called as functions."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from knep.nn.kinds import ACTIVATIONS, GATES
from knep.nn.own_activations import own_activation
from knep.surgery.record import Call, Recorder, calls, mode, name_of
from knep.surgery.sample import Inputs, call, ready

_NAMES = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "rrelu": nn.RReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "prelu": nn.PReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "hardsigmoid": nn.Hardsigmoid,
}
# Each function that is an activation, in torch, torch.nn.functional and as a method of tensors -> its module's class.
FUNCTIONS: Mapping[Any, type[nn.Module]] = {
    getattr(room, name): cls
    for base, cls in _NAMES.items()
    for name in (base, f"{base}_")
    for room in (torch, F, Tensor)
    if hasattr(room, name)
}


# What hands a signal on as it is, or moved and scaled by numbers.
_HANDS_ON = (
    {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "contiguous", "squeeze", "unsqueeze"}
    | {"__getitem__", "chunk", "split", "unbind", "cat", "concat", "stack", "clone", "to", "float", "double", "detach"}
    | {"interpolate", "expand", "clamp", "mul", "add", "sub", "div", "rsub", "__mul__", "__rmul__", "__add__"}
    | {"__radd__", "__sub__", "__rsub__", "__truediv__", "neg"}
)


@dataclass(frozen=True)
class FunctionCall:
    """One call of an activation as a function: the module whose forward called it, its first tensor in, and out."""

    module: nn.Module
    function: Callable[..., Tensor]
    input: Tensor
    output: Tensor


class Called(nn.Module):
    """An activation function as a module, which takes all that the function takes.

    extra: it was given more than a signal.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.extra = function, False

    def forward(self, *args: object, **kwargs: Any) -> Tensor:
        self.extra |= len(args) != 1 or bool(kwargs)
        return self.function(*args, **kwargs)


class _Watch(Recorder):
    """The call stack tells whose source is to be rewritten: also that of a module whose method another one calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules, self.seen = set(model.modules()), list[FunctionCall]()

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        if func in FUNCTIONS and args and isinstance(args[0], Tensor):
            owner = self._caller()
            if owner is not None and not isinstance(owner, Called) and not bends(owner, (*ACTIVATIONS, *GATES)):
                self.seen.append(FunctionCall(owner, func, args[0], output))
        return output

    def _caller(self) -> nn.Module | None:
        """The module whose method is the nearest one on the call stack."""
        frame = sys._getframe(2)
        while frame:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner in self.modules:
                return owner
            frame = frame.f_back
        return None


def watch(model: nn.Module, sample: Inputs) -> tuple[list[Call], list[FunctionCall]]:
    """The calls of modules (see `record.calls`), and those of activation functions outside activation modules."""
    with _Watch(model) as mode:
        return calls(model, sample), mode.seen


class _Trail(Recorder):
    """What each signal is handed on from, and the outputs of activations. All are kept, so that no id comes again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([m for m in model.modules() if bends(m, (*ACTIVATIONS, *GATES))])
        self.sources: dict[int, list[Tensor]] = {}
        self.made: list[tuple[nn.Module, Tensor]] = []
        self.kept: list[Any] = []

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self.made.append((module, output))

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = name_of(func)
        if name in _HANDS_ON and (len(read) == 1 or name in ("cat", "concat", "stack")):
            self.kept.append(output)
            for t in pytree.tree_leaves(output):
                if isinstance(t, Tensor) and not any(t is one for one in read):
                    self.sources[id(t)] = read
        return output


def final_activations(model: nn.Module, sample: Inputs) -> set[nn.Module]:
    """The activations whose every output is the model's own, as it is or after a change of shape or scale."""
    with torch.no_grad(), mode(model, False), _Trail(model) as trail:
        output = call(model, ready(model, sample))
    todo = [t for t in pytree.tree_leaves(_plain(output)) if isinstance(t, Tensor)]
    given: set[int] = set()
    while todo:
        t = todo.pop()
        if id(t) not in given:
            given.add(id(t))
            todo += trail.sources.get(id(t), [])
    others = {module for module, t in trail.made if id(t) not in given}
    return {module for module, _ in trail.made} - others


def _plain(output: Any) -> Any:
    """Hugging Face's outputs as tuples."""
    return output.to_tuple() if hasattr(output, "to_tuple") else output


def bends(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is an activation of these kinds, computes one, or stands for a function that is."""
    if isinstance(module, Called):
        return issubclass(FUNCTIONS[module.function], kinds)
    return isinstance(module, kinds) or issubclass(own_activation(module) or nn.Module, kinds)


def hidden_gates(seen: list[Call]) -> set[nn.Module]:
    """The sigmoids whose output goes straight into another module at every call, as no gate's does."""
    hidden: set[nn.Module] = set()
    gates: set[nn.Module] = set()
    for i, one in enumerate(seen):
        if bends(one.module, GATES):
            reads = (later.input is one.output and not isinstance(later.module, nn.Identity) for later in seen[i + 1 :])
            (hidden if any(reads) else gates).add(one.module)
    return hidden - gates


def overwritten(seen: list[Call]) -> set[nn.Module]:
    """The activations whose output is changed in place: by a function, or by a module such as Dropout(inplace=True)."""
    found: set[nn.Module] = set()
    for i, one in enumerate(seen):
        if bends(one.module, (*ACTIVATIONS, *GATES)):
            by_module = (
                later.input is one.output and getattr(later.module, "inplace", False) for later in seen[i + 1 :]
            )
            if one.output._version > one.version or any(by_module):
                found.add(one.module)
    return found

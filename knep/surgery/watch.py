"""One forward on a sample, watched: the calls of modules, and the activations that are called as functions."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knep.nn.kinds import ACTIVATIONS, GATES
from knep.surgery.record import Call, Recorder, calls

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

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.extra |= len(args) != 1 or bool(kwargs)
        return self.function(*args, **kwargs)


class _Watch(Recorder):
    """The call stack tells whose source is to be rewritten: also that of a module whose method another one calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules, self.seen = set(model.modules()), list[FunctionCall]()

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        if func in FUNCTIONS and args and isinstance(args[0], Tensor):
            owner = self._caller()
            if owner is not None and not isinstance(owner, (Called, *ACTIVATIONS, *GATES)):
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


def watch(model: nn.Module, sample: Tensor) -> tuple[list[Call], list[FunctionCall]]:
    """The calls of modules (see `record.calls`), and those of activation functions outside activation modules."""
    with _Watch(model) as mode:
        return calls(model, sample), mode.seen


def bends(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is an activation of these kinds, or stands for a function that is."""
    return issubclass(FUNCTIONS[module.function], kinds) if isinstance(module, Called) else isinstance(module, kinds)


def hidden_gates(seen: list[Call]) -> set[nn.Module]:
    """The sigmoids whose output goes straight into another module at every call, as no gate's does."""
    hidden: set[nn.Module] = set()
    gates: set[nn.Module] = set()
    for i, call in enumerate(seen):
        if bends(call.module, GATES):
            reads = (
                later.input is call.output and not isinstance(later.module, nn.Identity) for later in seen[i + 1 :]
            )
            (hidden if any(reads) else gates).add(call.module)
    return hidden - gates


def overwritten(seen: list[Call]) -> set[nn.Module]:
    """The activations whose output is changed in place: by a function, or by a module such as Dropout(inplace=True)."""
    found: set[nn.Module] = set()
    for i, call in enumerate(seen):
        if bends(call.module, (*ACTIVATIONS, *GATES)):
            by_module = (
                later.input is call.output and getattr(later.module, "inplace", False) for later in seen[i + 1 :]
            )
            if call.output._version > call.version or any(by_module):
                found.add(call.module)
    return found

"""`activation`: the nonlinearity. `f(model, *, sample, **hp)` puts torch's module where each activation module is.

Reached are the units of `knep.layers.ACTIVATIONS`. Sigmoid, Tanh and Hardsigmoid count where another module reads
their output directly, which `sample` shows; else they are taken for gates, which a nonlinearity of another range would
break, and stay. Activations that a forward calls as functions (F.relu) are not modules and are not reached.

Each function lists its changes, units that are already right as kept, and raises NoEffectError where there is none.
sample: images (N, C, H, W).
"""

from collections.abc import Callable

from torch import Tensor, nn

from knep.errors import InputError
from knep.layers import ACTIVATIONS, GATES, Call, Copy, calls
from knep.ranges import check
from knep.surgery import Change, describe, modules_of, replace, required

__all__ = ["gelu", "leaky_relu", "mish", "none", "relu", "selu", "sigmoid", "silu", "tanh"]

# Their backward reads their output: where the model goes on to change that in place, it gets a copy.
_SAVES_ITS_OUTPUT = (nn.ReLU, nn.LeakyReLU, nn.SELU, nn.Tanh, nn.Sigmoid)


def none(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Keeps the model's own."""
    return []


def relu(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Cuts what is negative: max(0, x) (Nair and Hinton 2010)."""
    return _exchange(model, sample, nn.ReLU)


def leaky_relu(model: nn.Module, *, sample: Tensor | None = None, negative_slope: float = 0.01) -> list[Change]:
    """Shrinks what is negative: max(x, negative_slope x), so that no unit dies (Maas et al. 2013).

    negative_slope: output per input below 0, in [0, 1).
    """
    check("negative_slope", negative_slope, "[0, 1)")
    return _exchange(model, sample, lambda: nn.LeakyReLU(negative_slope))


def gelu(model: nn.Module, *, sample: Tensor | None = None, approximate: str = "none") -> list[Change]:
    """Weighs the input by its rank under a standard normal: x Phi(x) (Hendrycks and Gimpel 2016).

    approximate: "none" is exact, "tanh" the authors' faster formula.
    """
    if approximate not in ("none", "tanh"):
        raise InputError(f"approximate must be none or tanh, got {approximate}")
    return _exchange(model, sample, lambda: nn.GELU(approximate))


def silu(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Gates the input by itself: x sigmoid(x), also called swish (Elfwing et al. 2018; Ramachandran et al. 2017)."""
    return _exchange(model, sample, nn.SiLU)


def mish(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Gates the input smoothly: x tanh(log(1 + e^x)) (Misra 2019)."""
    return _exchange(model, sample, nn.Mish)


def selu(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Scales an exponential linear unit so that mean 0 and variance 1 are a fixed point (Klambauer et al. 2017).

    Holds for weights from `init=lecun_normal`, without norm, and with `dropout=alpha`.
    """
    return _exchange(model, sample, nn.SELU)


def tanh(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Presses the signal into (-1, 1), odd around 0 (LeCun et al. 1998, Efficient BackProp, sec. 4.4)."""
    return _exchange(model, sample, nn.Tanh)


def sigmoid(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Presses the signal into (0, 1): 1 / (1 + e^-x) (Rumelhart et al. 1986). Its slope is 1/4 at most."""
    return _exchange(model, sample, nn.Sigmoid)


def _exchange(model: nn.Module, sample: Tensor | None, make: Callable[[], nn.Module]) -> list[Change]:
    seen = calls(model, sample) if sample is not None else []
    hidden, overwritten = _hidden_gates(seen), _overwritten(seen)
    new: dict[nn.Module, nn.Module] = {}
    changes = []
    for path, old in modules_of(model, *ACTIVATIONS, *GATES):
        if isinstance(old, GATES) and old not in hidden:
            continue
        if old not in new:
            new[old] = _successor(old, make(), old in overwritten)
        changes.append(Change(path, describe(old), "kept" if new[old] is old else _text(new[old])))
        if new[old] is not old:
            replace(model, path, new[old])
    return required(changes, "activation", "the model has no activation modules (calls of F.relu cannot be reached)")


def _text(module: nn.Module) -> str:
    return ", ".join(map(describe, module)) if isinstance(module, nn.Sequential) else describe(module)


def _successor(old: nn.Module, new: nn.Module, overwritten: bool) -> nn.Module:
    """`old` itself if it is what is asked for, else `new`, which works in place where `old` did."""
    if getattr(old, "inplace", False) and hasattr(new, "inplace"):
        setattr(new, "inplace", True)  # noqa: B010
    if describe(old) == describe(new):
        return old
    return nn.Sequential(new, Copy()) if overwritten and isinstance(new, _SAVES_ITS_OUTPUT) else new


def _hidden_gates(seen: list[Call]) -> set[nn.Module]:
    """The sigmoids whose output goes straight into another module at every call, as no gate's does."""
    hidden: set[nn.Module] = set()
    gates: set[nn.Module] = set()
    for i, call in enumerate(seen):
        if isinstance(call.module, GATES):
            reads = (
                later.input is call.output and not isinstance(later.module, nn.Identity) for later in seen[i + 1 :]
            )
            (hidden if any(reads) else gates).add(call.module)
    return hidden - gates


def _overwritten(seen: list[Call]) -> set[nn.Module]:
    """The activations whose output is changed in place: by a function, or by a module such as Dropout(inplace=True)."""
    found: set[nn.Module] = set()
    for i, call in enumerate(seen):
        if isinstance(call.module, (*ACTIVATIONS, *GATES)):
            by_module = (
                later.input is call.output and getattr(later.module, "inplace", False) for later in seen[i + 1 :]
            )
            if call.output._version > call.version or any(by_module):
                found.add(call.module)
    return found

"""`activation`: the nonlinearity. `f(model, *, sample, **hp)` puts torch's module where each activation is.

Reached are the modules of `knep.nn.kinds.ACTIVATIONS`, classes of others that compute one of these or say so by their
name (Hugging Face's NewGELUActivation, timm's Swish), and the same as functions: F.relu(x), torch.relu(x), x.relu(),
also where a layer holds the function (self.act = F.relu), as nn.TransformerEncoderLayer does. A call becomes a child
module, activation_0 and so on, of the module whose code makes it (see `knep.surgery.rewrite_calls`); torch's fused path
of transformer layers, which has the old activation built in, is switched off.

Sigmoid, tanh and hardsigmoid count where another module reads their output directly, which `sample` shows; else they
are taken for gates, which a nonlinearity of another range would break, and stay. Attention's softmax is no activation.
An activation whose output is the model's own stays, as the sample shows, for a loss may count on its range; so does any
in a part that is frozen while others are trained. Both are listed as kept.

Each function lists its changes, units that are already right as kept, and, given a sample, calls that it saw and could
not reach as not reached. It raises NoEffectError where it reached none. sample: images (N, C, H, W).
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from knep.errors import InputError
from knep.nn.blocks import Copy
from knep.nn.kinds import ACTIVATIONS, GATES
from knep.nn.own_activations import own_activation, unknown_activation
from knep.surgery.edit import (
    Change,
    bare,
    describe,
    frozen_parts,
    modules_of,
    refuse_hooks,
    replace,
    required,
    text,
    unfuse,
)
from knep.surgery.find_activations import Unit, exposed, unreached
from knep.surgery.record import Call
from knep.surgery.sample import Inputs
from knep.surgery.watch import Called, bends, final_activations, hidden_gates, overwritten, watch
from knep.utils.validation import check

__all__ = ["gelu", "leaky_relu", "mish", "none", "relu", "selu", "sigmoid", "silu", "tanh"]

_LEFT, _KEPT = "not reached", "kept: "
# Their backward reads their output: where the model goes on to change that in place, it gets a copy.
_SAVES_ITS_OUTPUT = (nn.ReLU, nn.LeakyReLU, nn.SELU, nn.Tanh, nn.Sigmoid)


def none(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Keeps the model's own."""
    return []


def relu(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Cuts what is negative: max(0, x) (Nair and Hinton 2010)."""
    return _exchange(model, sample, nn.ReLU)


def leaky_relu(model: nn.Module, *, sample: Inputs | None = None, negative_slope: float = 0.01) -> list[Change]:
    """Shrinks what is negative: max(x, negative_slope x), so that no unit dies (Maas et al. 2013).

    negative_slope: output per input below 0, in [0, 1).
    """
    check("negative_slope", negative_slope, "[0, 1)")
    return _exchange(model, sample, lambda: nn.LeakyReLU(negative_slope))


def gelu(model: nn.Module, *, sample: Inputs | None = None, approximate: str = "none") -> list[Change]:
    """Weighs the input by its rank under a standard normal: x Phi(x) (Hendrycks and Gimpel 2016).

    approximate: "none" is exact, "tanh" the authors' faster formula.
    """
    if approximate not in ("none", "tanh"):
        raise InputError(f"approximate must be none or tanh, got {approximate}")
    return _exchange(model, sample, lambda: nn.GELU(approximate))


def silu(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Gates the input by itself: x sigmoid(x), also called swish (Elfwing et al. 2018; Ramachandran et al. 2017)."""
    return _exchange(model, sample, nn.SiLU)


def mish(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Gates the input smoothly: x tanh(log(1 + e^x)) (Misra 2019)."""
    return _exchange(model, sample, nn.Mish)


def selu(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Scales an exponential linear unit so that mean 0 and variance 1 are a fixed point (Klambauer et al. 2017).

    Holds for weights from `init=lecun_normal`, without norm, and with `dropout=alpha`.
    """
    return _exchange(model, sample, nn.SELU)


def tanh(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Presses the signal into (-1, 1), odd around 0 (LeCun et al. 1998, Efficient BackProp, sec. 4.4)."""
    return _exchange(model, sample, nn.Tanh)


def sigmoid(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Presses the signal into (0, 1): 1 / (1 + e^-x) (Rumelhart et al. 1986). Its slope is 1/4 at most."""
    return _exchange(model, sample, nn.Sigmoid)


def _exchange(model: nn.Module, sample: Inputs | None, make: Callable[[], nn.Module]) -> list[Change]:
    model = bare(model)
    if isinstance(model, (*ACTIVATIONS, *GATES)):
        raise InputError(f"the model itself is a {type(model).__name__}: wrap it in nn.Sequential to exchange it")
    with exposed(model) as units:
        seen, functions = watch(model, sample) if sample is not None else ([], [])
        hidden, copied = hidden_gates(seen), overwritten(seen)
        left = unreached(model, seen, functions)
        meant = _Meant(model, sample, seen, hidden)
        changes = _exchange_modules(model, make, hidden, copied, meant)
        changes += [
            meant.kept(unit) or _settle(unit, make(), unit.called in copied)
            for unit in units
            if bends(unit.called, ACTIVATIONS) or unit.called in hidden | meant.last
        ]
    left += [change for change in changes if change.after.startswith((_LEFT, _KEPT))]
    done = [change for change in changes if not change.after.startswith((_LEFT, _KEPT))]
    why = "it has no activation modules, and the source of its classes shows no calls such as F.relu"
    gate = next((path for path, m in modules_of(model, nn.Module) if bends(m, GATES)), None)
    if gate is not None:
        why = f"{gate} ({type(model.get_submodule(gate)).__name__}) may be a gate, as far as "
        why += "the sample shows" if sample is not None else "can be told without a sample: give sample="
    why = f"{left[0].path}: {left[0].before} is {left[0].after}" if left else why
    return required(done, "activation", why) + left


class _Meant:
    """Why an activation is to stay as it is: its part is frozen, or its output is the model's.

    Two are exchanged all the same, unless they are gates: one that a part of the model reads too, as the stages of a
    backbone that gives them all; and the only one of a model, where nothing else can be meant.
    """

    def __init__(self, model: nn.Module, sample: Inputs | None, seen: list[Call], hidden: set[nn.Module]) -> None:
        self._frozen = frozen_parts(model)
        self.last = set() if sample is None else final_activations(model, sample)
        read = {id(one.input) for one in seen if any(True for _ in one.module.parameters())}
        inner = {one.module for one in seen if id(one.output) in read and not bends(one.module, GATES)}
        self.last -= inner
        every = {m for m in model.modules() if bends(m, ACTIVATIONS) or m in hidden}
        if not every - self.last:
            self.last = {m for m in self.last if bends(m, GATES)}

    def reason(self, path: str, called: nn.Module) -> str:
        if called in self.last:
            return f"{_KEPT}it is the model's output"
        return f"{_KEPT}frozen" if self._frozen(path) else ""

    def kept(self, unit: Unit) -> Change | None:
        reason = self.reason(unit.path, unit.called)
        return Change(f"{unit.path}.{unit.name}".lstrip("."), str(unit), reason) if reason else None


def _exchange_modules(
    model: nn.Module, make: Callable[[], nn.Module], hidden: set[nn.Module], copied: set[nn.Module], meant: _Meant
) -> list[Change]:
    new: dict[nn.Module, nn.Module] = {}
    changes = []
    for path, old in modules_of(model, nn.Module):
        inside = any(isinstance(m, Called) and bends(m, ACTIVATIONS) for m in old.children())
        if isinstance(old, Called):
            continue
        if unknown_activation(old) and not inside:
            changes.append(Change(path, describe(old), f"{_LEFT}: it bends each value, and is no activation known"))
        if not bends(old, (*ACTIVATIONS, *GATES)):
            continue
        if bends(old, GATES) and old not in hidden and old not in meant.last:
            continue
        if reason := meant.reason(path, old):
            changes.append(Change(path, describe(old), reason))
            continue
        if own_activation(old) is None and not _is_plain(old):
            changes.append(Change(path, describe(old), f"{_LEFT}: its own forward does more"))
            continue
        if old not in new:
            refuse_hooks(path, old, "activation")
            new[old] = _successor(old, make(), old in copied)
        changes.append(Change(path, describe(old), "kept" if new[old] is old else text(new[old])))
        if new[old] is not old:
            replace(model, path, new[old])
            unfuse(model.get_submodule(path.rpartition(".")[0]))
    return changes


def _settle(unit: Unit, new: nn.Module, overwritten: bool) -> Change:
    """Puts the new activation where a function was called, unless that is what is asked for already."""
    if unit.site is None and unit.called.extra:
        return Change(f"{unit.path}.{unit.name}".lstrip("."), str(unit), f"{_LEFT}: it is given more than a signal")
    if unit.inplace and hasattr(new, "inplace"):
        setattr(new, "inplace", True)  # noqa: B010
    if unit.old is not None and _successor(unit.old, new, overwritten) is unit.old:
        return Change(unit.path or "the model", str(unit), "kept")
    placed = _copied(new, overwritten)
    unfuse(unit.owner)
    return Change(unit.become(placed), str(unit), text(placed))


def _successor(old: nn.Module, new: nn.Module, overwritten: bool) -> nn.Module:
    """`old` itself if it is what is asked for, else `new`, which works in place where `old` did."""
    if getattr(old, "inplace", False) and hasattr(new, "inplace"):
        setattr(new, "inplace", True)  # noqa: B010
    return old if describe(old) == describe(new) else _copied(new, overwritten)


def _copied(new: nn.Module, overwritten: bool) -> nn.Module:
    return nn.Sequential(new, Copy()) if overwritten and isinstance(new, _SAVES_ITS_OUTPUT) else new


def _is_plain(module: nn.Module) -> bool:
    """Whether a module does what torch's activation that it derives from does."""
    base = next(c for c in type(module).__mro__ if c.__module__.startswith("torch."))
    if type(module).forward is base.forward:  # pyright: ignore[reportAttributeAccessIssue]
        return True
    x = torch.linspace(-6, 6, 64)
    twin = deepcopy(module).to_empty(device="cpu").float().eval()
    for parameter in twin.parameters():
        nn.init.constant_(parameter, 0.3)
    with torch.no_grad():
        want = base.forward(twin, x.clone())  # pyright: ignore[reportAttributeAccessIssue]
        return torch.allclose(twin(x.clone()), want, atol=1e-5)

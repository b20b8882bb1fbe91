"""Activations that are classes of their own, such as Hugging Face's NewGELUActivation, told by what they compute."""

from __future__ import annotations

import copy
import inspect
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from knep.nn.kinds import ACTIVATIONS, GATES

_WORDS = {"elu": nn.ELU, "silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish}  # elu: relu, gelu, selu and the like too
_NEAR = 0.03  # of gelu are its approximations, by tanh and by a sigmoid, at most 0.021 away
_known: WeakKeyDictionary[nn.Module, tuple[str, type[nn.Module] | None]] = WeakKeyDictionary()


def own_activation(module: nn.Module) -> type[nn.Module] | None:
    """The activation of torch that a class of somebody's own computes, or is by its name; None for all else."""
    return _judged(module)[1]


def unknown_activation(module: nn.Module) -> bool:
    """Whether a module bends each value by itself, as an activation does, and is none that is known."""
    said, kind = _judged(module)
    return said == "bends" and kind is None


def _judged(module: nn.Module) -> tuple[str, type[nn.Module] | None]:
    if module not in _known:
        _known[module] = _judge(module)
    return _known[module]


def _judge(module: nn.Module) -> tuple[str, type[nn.Module] | None]:
    """("bends", its kind where that is known), or ("", None) for what is no function of single values."""
    cls = type(module)
    held = any(True for _ in module.parameters()) or any(True for _ in module.buffers()) or any(module.children())
    if held or isinstance(module, (*ACTIVATIONS, *GATES)):
        return "", None
    x = torch.linspace(-6, 6, 64).reshape(4, 16)
    y = _outputs(module, x)
    if y is None or torch.allclose(y.flatten().diff(n=2), torch.zeros(()), atol=1e-4):
        return "", None
    if cls.__module__.startswith("torch.nn."):  # such as Softplus, which is chosen for its range
        return "bends", None
    with torch.no_grad():
        for kind in (*ACTIVATIONS, *GATES):
            if float((kind().eval()(x) - y).abs().max()) < _NEAR:
                return "bends", kind
    return "bends", next((kind for word, kind in _WORDS.items() if word in cls.__name__.lower()), None)


def _outputs(module: nn.Module, x: Tensor) -> Tensor | None:
    """What the module makes of x; None where it fails, or where a value depends on more than its own input."""
    try:
        wanted = inspect.signature(module.forward).parameters.values()
        if sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in wanted) != 1:
            return None
        twin = copy.deepcopy(module).eval()
        with torch.no_grad(), torch.random.fork_rng([]):
            y, turned, alone = twin(x.clone()), twin(x.flip(0, 1).clone()), twin(x[:1, :3].clone())
    except Exception:  # a stranger's module, which may want anything
        return None
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in (y, turned, alone)):
        return None
    if y.shape != x.shape or alone.shape != (1, 3) or not torch.isfinite(y).all():
        return None
    single = torch.allclose(turned.flip(0, 1), y, atol=1e-5) and torch.allclose(alone, y[:1, :3], atol=1e-5)
    return y if single else None

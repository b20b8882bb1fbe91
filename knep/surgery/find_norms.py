"""Which modules of anybody's model are norm layers, which axis holds their channels, and what else they do.

A module is a norm layer if its forward is that of one of torch's, torchvision's or knep's norm classes. A subclass
with a forward of its own, and any other module that owns a gain per channel, is run on random signals, with random
weights, in eval and in training mode: it is a norm layer if its output is that of a plain norm followed by its own
children, as in timm's BatchNormAct2d (norm, dropout, activation). So are the many LayerNorm2d and RMSNorm classes.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized
from torchvision.models.convnext import LayerNorm2d

from knep.errors import InputError
from knep.nn.norm import (
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    LastAxis,
    LastRMSNorm,
    PixelRMSNorm,
    RMSNorm,
    TokenGroupNorm,
)
from knep.surgery.edit import modules_of, refuse_hooks

LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RMSNorm)

# forward -> the axis of the channels: "first" is axis 1, "last" the last axes, "pixel" axis 1 of each pixel alone.
_AXES: dict[Callable[..., Tensor], str] = {
    LastAxis.forward: "last",
    TokenGroupNorm.forward: "last",
    nn.LayerNorm.forward: "last",
    nn.RMSNorm.forward: "last",
    LastRMSNorm.forward: "last",
    LayerNorm2d.forward: "pixel",
    PixelRMSNorm.forward: "pixel",
    _BatchNorm.forward: "first",
    nn.SyncBatchNorm.forward: "first",
    GhostBatchNorm.forward: "first",
    nn.GroupNorm.forward: "first",
    GroupNorm.forward: "first",
    _InstanceNorm.forward: "first",
    InstanceNorm.forward: "first",
    RMSNorm.forward: "first",
}
_EPS = ("eps", "variance_epsilon", "epsilon")
# What a module says when it is given a signal that it was not made for.
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class Found:
    """A norm layer: a plain norm with its parameters (itself, if it is of a known class), and what follows in it.

    axis: "first", "last" or "pixel"; shape: channels, or the axes that a layer norm normalises.
    """

    plain: Any
    axis: str
    shape: list[int]
    children: dict[str, nn.Module] = field(default_factory=dict)


def norms_of(
    model: nn.Module, skipped: Callable[[str], bool] = lambda path: False
) -> tuple[list[tuple[str, nn.Module, Found]], list[tuple[str, nn.Module]]]:
    """(path, module, what it is) of each norm layer, all paths of shared ones included; and what is only called so, or
    derives from a norm and does more than normalise.

    skipped: paths to leave out. Raises InputError, naming the module, for a norm layer that has parametrised weights or
    carries hooks, which a new one would lose, and for a model that is a norm layer itself.
    """
    if isinstance(model, LAYERS):
        raise InputError(f"the model itself is a {type(model).__name__}: wrap it in nn.Sequential to exchange it")
    seen: dict[nn.Module, Found | None] = {}
    found, strange = [], []
    for path, module in modules_of(model, nn.Module):
        if skipped(path):
            continue
        if module not in seen:
            seen[module] = _identify(path, module)
        if (norm := seen[module]) is not None:
            found.append((path, module, norm))
        elif _is_called_norm(module) or isinstance(module, LAYERS):
            strange.append((path, module))
    return found, strange


def _identify(path: str, module: nn.Module) -> Found | None:
    known = isinstance(module, LAYERS)
    if not known and not _owns_gain(module):
        return None
    name = f"{path} ({type(module).__name__})"
    if known and is_parametrized(module):
        raise InputError(f"{name} has a parametrisation, which a new norm would lose: remove it, or use norm=none")
    axis = _AXES.get(type(module).forward)
    norm = Found(module, axis, _shape(module)) if known and axis else _proven(module)
    if norm:
        refuse_hooks(path, module, "norm")
    return norm


def _owns_gain(module: nn.Module) -> bool:
    gain = module._parameters.get("weight")
    return gain is not None and gain.dim() == 1 and not _is_ours(module)


def _gain(module: nn.Module) -> nn.Parameter:
    """Of a module that `_owns_gain`."""
    gain = module._parameters["weight"]
    assert gain is not None
    return gain


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.", "knep."))


def _is_called_norm(module: nn.Module) -> bool:
    leaf = not any(True for _ in module.children())
    flat = all(p.dim() == 1 for p in module.parameters(recurse=False))
    return leaf and flat and "norm" in type(module).__name__.lower() and not _is_ours(module)


def _shape(module: nn.Module) -> list[int]:
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return list(module.normalized_shape)
    return [module.num_channels if isinstance(module, nn.GroupNorm) else cast("int", module.num_features)]


def _proven(module: nn.Module) -> Found | None:
    """What `module` is, if a probe shows that it is exactly one plain norm, followed by its children."""
    proofs = [(axis, plain) for axis, plain, norm in _hypotheses(module) if _equal(module, norm, axis)]
    if len(proofs) != 1:
        return None
    axis, plain = proofs[0]
    bends = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    return Found(plain, axis, _shape(plain), bends)


def _hypotheses(module: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[[Any, Tensor], Tensor]]]:
    """(axis, the plain norm, how to compute it from a copy of `module`) of what `module` might be."""
    base = next((c.forward for c in type(module).__mro__ if getattr(c, "forward", None) in _AXES), None)
    if base and _AXES[base] == "first":
        yield "first", module, base
    elif base:
        yield "last", module, base
        yield "pixel", module, lambda m, x: base(m, x.movedim(1, -1)).movedim(-1, 1)
    else:
        yield from _lookalikes(module)


def _lookalikes(module: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[[Any, Tensor], Tensor]]]:
    eps = next((e for name in _EPS if isinstance(e := getattr(module, name, None), float)), 1e-6)
    bias = module._parameters.get("bias")
    for make in (nn.LayerNorm, LastRMSNorm, LayerNorm2d, PixelRMSNorm):
        plain = make([len(_gain(module))], eps=eps)
        plain.weight, plain.bias = _gain(module), bias  # type: ignore[assignment]

        def norm(m: nn.Module, x: Tensor, plain: nn.Module = plain) -> Tensor:
            own: dict[str, Tensor] = {
                name: p for name, p in (("weight", _gain(m)), ("bias", m._parameters.get("bias"))) if p is not None
            }
            return torch.func.functional_call(plain, own, (x,), strict=False)

        yield _AXES[make.forward], plain, norm


def _equal(module: nn.Module, norm: Callable[[Any, Tensor], Tensor], axis: str) -> bool:
    """Whether `module` computes `norm` and then its children, in eval and training mode, from the same random draw."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        one = _random_copy(module)
        two, x = deepcopy(one), _signal(module, axis)
        try:
            return all(_runs_equal(one.train(mode), two.train(mode), norm, x) for mode in (False, True))
        except _REFUSALS:
            return False


def _runs_equal(one: nn.Module, two: nn.Module, norm: Callable[[Any, Tensor], Tensor], x: Tensor) -> bool:
    torch.manual_seed(1)
    want = one(x.clone())
    torch.manual_seed(1)
    got = norm(two, x.clone())
    for child in two.children():
        got = child(got)
    return want.shape == got.shape and torch.allclose(want.double(), got.double(), rtol=1e-4, atol=1e-5)


def _random_copy(module: nn.Module) -> nn.Module:
    """A copy in float32 on the CPU, also of a module on meta, with gains and variances in (0.5, 1.5)."""
    copy = deepcopy(module).to_empty(device="cpu").float()
    for tensor in (*copy.parameters(), *copy.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
        else:
            tensor.data.zero_()
    return copy


def _signal(module: nn.Module, axis: str) -> Tensor:
    """Four random images; small, so that eps counts. No other axis is as long as the channels."""
    channels = _shape(module) if isinstance(module, LAYERS) else [len(_gain(module))]
    side = 2 if channels == [3] else 3
    flat = isinstance(module, (nn.BatchNorm1d, nn.InstanceNorm1d))
    deep = isinstance(module, (nn.BatchNorm3d, nn.InstanceNorm3d))
    pixels = [side] * (1 if flat else 3 if deep else 2)
    return 0.03 * torch.randn(4, *([side, *channels] if axis == "last" else [*channels, *pixels])) + 0.02

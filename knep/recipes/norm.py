"""`norm`: the normalisation layer and its place. `f(model, *, sample, position, **hp)` edits the model in place.

A knep model has a place behind the weights and before the activation ("before_activation") and one behind the
activation ("after_activation"). In any other model the norm layers it has are replaced where they stand; they keep
their gains and shifts. A layer that is already of the kind asked for is kept, and listed as kept.

Each function lists its changes, and raises NoEffectError where there is neither a place nor a norm layer, and
InputError, before the first change, where its statistics make no sense for a layer's signal.
sample: images (N, C, H, W), for the shapes that reach each layer; without it they are checked in the first forward.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from torchvision.models.convnext import LayerNorm2d

from knep.errors import InputError
from knep.layers import (
    BatchNorm,
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    LastRMSNorm,
    PixelRMSNorm,
    RMSNorm,
    ZeroGain,
    calls,
    classifier_of,
    fewest_values,
    whole,
)
from knep.ranges import check
from knep.surgery import Change, Place, describe, modules_of, replace, required

__all__ = ["batch", "ghost_batch", "group", "instance", "layer", "none", "rms", "spectral", "weight"]

_PLACES = {"before_activation": "norm", "after_activation": "norm_after"}
_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RMSNorm)
_LAST_AXIS = (nn.LayerNorm, nn.RMSNorm)


def none(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Leaves the places empty and the model's own norm layers alone."""
    _refuse_empty_zero_gains(model, "none")
    return []


def batch(
    model: nn.Module,
    *,
    sample: Tensor | None = None,
    position: str = "before_activation",
    momentum: float | None = None,
    eps: float | None = None,
) -> list[Change]:
    """Gives each channel mean 0 and variance 1 over batch and pixels (Ioffe and Szegedy 2015), running ones in eval.

    momentum: weight of the new batch in the running statistics, in [0, 1]; eps: added to the variance, in (0, inf).
    None is the layer's own value, and 0.1 and 1e-5 in a place.
    """
    _check_batch(momentum, eps)

    def kept(old: Any) -> bool:
        own = isinstance(old, _BatchNorm) and not isinstance(old, GhostBatchNorm)
        return own and momentum in (None, old.momentum) and eps in (None, old.eps)

    def make(channels: int, shapes: list[torch.Size], old: nn.Module) -> nn.Module:
        return BatchNorm(channels, eps=_own(old, "eps", eps, 1e-5), momentum=_own(old, "momentum", momentum, 0.1))

    return _normalise(model, _Kind("batch", kept, make), sample, position)


def ghost_batch(
    model: nn.Module,
    *,
    sample: Tensor | None = None,
    position: str = "before_activation",
    ghost_size: int = 32,
    momentum: float | None = None,
    eps: float | None = None,
) -> list[Change]:
    """Batch norm over parts of at least ghost_size images, as if the batch were that small (Hoffer et al. 2017).

    ghost_size: images, from 2 on. momentum, eps: as for `batch`.
    """
    whole("ghost_size", ghost_size, 2)
    _check_batch(momentum, eps)

    def make(channels: int, shapes: list[torch.Size], old: nn.Module) -> nn.Module:
        own_eps, own_momentum = _own(old, "eps", eps, 1e-5), _own(old, "momentum", momentum, 0.1)
        return GhostBatchNorm(channels, ghost_size=ghost_size, eps=own_eps, momentum=own_momentum)

    return _normalise(model, _Kind("ghost_batch", lambda old: False, make), sample, position)


def layer(
    model: nn.Module, *, sample: Tensor | None = None, position: str = "before_activation", eps: float = 1e-5
) -> list[Change]:
    """Gives each image's signal mean 0 and variance 1 over all channels and pixels (Ba et al. 2016).

    Where a model normalises its last axis, or the channels of each pixel, the new norm does the same.

    eps: added to the variance, in (0, inf).
    """
    check("eps", eps, "(0, inf)")

    def kept(old: Any) -> bool:
        return isinstance(old, nn.LayerNorm) or (isinstance(old, nn.GroupNorm) and old.num_groups == 1)

    def make(channels: int, shapes: list[torch.Size], old: nn.Module) -> nn.Module:
        return GroupNorm(_groups("layer", channels, 1, shapes), channels, eps=eps)

    def last(old: Any) -> nn.Module:
        made = LayerNorm2d if isinstance(old, PixelRMSNorm) else nn.LayerNorm
        return made(list(old.normalized_shape), eps=eps)

    return _normalise(model, _Kind("layer", kept, make, last=last), sample, position)


def group(
    model: nn.Module,
    *,
    sample: Tensor | None = None,
    position: str = "before_activation",
    groups: int = 8,
    eps: float = 1e-5,
) -> list[Change]:
    """Gives each group of channels of each image mean 0 and variance 1 (Wu and He 2018).

    groups: how many, from 1 on; a layer has the largest divisor of its channels up to there that leaves two values per
    group. eps: added to the variance, in (0, inf).
    """
    whole("groups", groups, 1)
    check("eps", eps, "(0, inf)")

    def kept(old: Any) -> bool:
        return isinstance(old, nn.GroupNorm) and old.num_groups == groups

    def make(channels: int, shapes: list[torch.Size], old: nn.Module) -> nn.Module:
        return GroupNorm(_groups("group", channels, groups, shapes), channels, eps=eps)

    return _normalise(model, _Kind("group", kept, make), sample, position)


def instance(
    model: nn.Module, *, sample: Tensor | None = None, position: str = "before_activation", eps: float = 1e-5
) -> list[Change]:
    """Gives each channel of each image mean 0 and variance 1 over its pixels (Ulyanov et al. 2016).

    eps: added to the variance, in (0, inf). Refuses a signal with one value per channel.
    """
    check("eps", eps, "(0, inf)")

    def kept(old: Any) -> bool:
        return isinstance(old, _InstanceNorm)

    def make(channels: int, shapes: list[torch.Size], old: nn.Module) -> nn.Module:
        for shape in shapes:
            fewest_values("instance", shape, shape[2:].numel())
        return InstanceNorm(channels, eps=eps, affine=True)

    return _normalise(model, _Kind("instance", kept, make), sample, position)


def rms(
    model: nn.Module, *, sample: Tensor | None = None, position: str = "before_activation", eps: float = 1e-6
) -> list[Change]:
    """Divides each image's signal by its root mean square; the mean stays (Zhang and Sennrich 2019).

    Where a model normalises its last axis, or the channels of each pixel, the new norm does the same.

    eps: added to the mean square, in (0, inf).
    """
    check("eps", eps, "(0, inf)")

    def kept(old: Any) -> bool:
        return isinstance(old, (nn.RMSNorm, RMSNorm))

    def make(channels: int, shapes: list[torch.Size], old: nn.Module) -> nn.Module:
        return RMSNorm(channels, eps=eps)

    def last(old: Any) -> nn.Module:
        made = PixelRMSNorm if isinstance(old, LayerNorm2d) else LastRMSNorm
        return made(list(old.normalized_shape), eps=eps)

    return _normalise(model, _Kind("rms", kept, make, last=last, shifts=False), sample, position)


def weight(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Splits each unit's weights into length and direction, w = g v / ||v|| (Salimans and Kingma 2016).

    Acts on all linear layers and convolutions but the classifier; the function stays as it was. Places stay empty.
    """
    _refuse_empty_zero_gains(model, "weight")
    changes = []
    for path, m in _weighted(model, sample):
        parametrizations.weight_norm(m, "weight", dim=1 if isinstance(m, _ConvTransposeNd) else 0)
        changes.append(Change(f"{path}.weight", "free", "g v / ||v||"))
    return required(changes, "norm.weight", "the model has no linear layer or convolution but its classifier")


def spectral(
    model: nn.Module, *, sample: Tensor | None = None, n_power_iterations: int = 1, eps: float = 1e-12
) -> list[Change]:
    """Divides each weight matrix by its largest singular value, so that no layer stretches (Miyato et al. 2018).

    Acts on all linear layers and convolutions but the classifier. Places stay empty.

    n_power_iterations: steps of the estimate per training forward, from 1 on. eps: least length, in (0, inf).
    """
    whole("n_power_iterations", n_power_iterations, 1)
    check("eps", eps, "(0, inf)")
    _refuse_empty_zero_gains(model, "spectral")
    changes = []
    for path, m in _weighted(model, sample):
        parametrizations.spectral_norm(m, "weight", n_power_iterations=n_power_iterations, eps=eps)
        changes.append(Change(f"{path}.weight", "free", "w / sigma(w)"))
    return required(changes, "norm.spectral", "the model has no linear layer or convolution but its classifier")


@dataclass(frozen=True)
class _Kind:
    """One norm: which layers it keeps, what it puts before channels on axis 1, and on the last axis if it can."""

    name: str
    kept: Callable[[Any], bool]
    make: Callable[[int, list[torch.Size], nn.Module], nn.Module]
    last: Callable[[Any], nn.Module] | None = None
    shifts: bool = True


def _normalise(model: nn.Module, kind: _Kind, sample: Tensor | None, position: str) -> list[Change]:
    if position not in _PLACES:
        raise InputError(f"position must be one of {', '.join(_PLACES)}, got {position}")
    shapes = _shapes(model, sample)
    found = [(p, m) for p, m in modules_of(model, Place) if m.kind == _PLACES[position]]
    existing = list(modules_of(model, *_LAYERS))
    if position == "after_activation":
        _refuse_empty_zero_gains(model, f"{kind.name} behind the activation")
        _refuse_moving(existing)
    new: dict[int, nn.Module] = {}
    for path, old in found + existing:
        if id(old) not in new:
            new[id(old)] = old if kind.kept(old) else _successor(path, old, kind, shapes[old])
    changes = [change for path, old in found + existing for change in _exchange(model, path, old, new[id(old)], kind)]
    reason = f"the model has no norm layer and no place for one {position.replace('_', ' the ')}"
    return required(changes, f"norm.{kind.name}", reason)


def _exchange(model: nn.Module, path: str, old: nn.Module, new: nn.Module, kind: _Kind) -> Iterator[Change]:
    if new is old:
        yield Change(path, describe(old), "kept")
        return
    yield Change(path, describe(old), describe(new))
    replace(model, path, new)
    if isinstance(old, Place) and old.kind == "norm" and kind.shifts:
        yield from _take_bias(model, path, old.features)


def _take_bias(model: nn.Module, path: str, features: int) -> Iterator[Change]:
    """The norm's own shift replaces the bias of the layer registered right before it, as in every published net."""
    parent, _, name = path.rpartition(".")
    siblings = list(model.get_submodule(parent)._modules.items())
    at = next(i for i, (sibling, _) in enumerate(siblings) if sibling == name)
    before, m = siblings[at - 1] if at else ("", None)
    units = getattr(m, "out_features", getattr(m, "out_channels", None))
    if isinstance(m, (nn.Linear, _ConvNd)) and m.bias is not None and units == features:
        m.register_parameter("bias", None)
        yield Change(f"{parent}.{before}.bias".lstrip("."), f"{features} values", "none: the norm's shift replaces it")


def _shapes(model: nn.Module, sample: Tensor | None) -> defaultdict[nn.Module, list[torch.Size]]:
    shapes = defaultdict(list)
    for call in calls(model, sample) if sample is not None else ():
        shapes[call.module].append(call.input.shape)
    return shapes


def _successor(path: str, old: Any, kind: _Kind, shapes: list[torch.Size]) -> nn.Module:
    """The module that takes the place of `old`, with its gain, shift and running statistics."""
    last_axis = isinstance(old, _LAST_AXIS)
    if last_axis and type(old) not in (nn.LayerNorm, nn.RMSNorm, LayerNorm2d, LastRMSNorm, PixelRMSNorm):
        raise InputError(f"norm.{kind.name} does not know which axis {path} ({type(old).__name__}) normalises")
    if last_axis and kind.last:
        new = kind.last(old)
    elif last_axis and not _is_channels_first(old, shapes):
        raise InputError(
            f"norm.{kind.name} cannot act on {path}, which normalises the last axis of (N, ..., C): "
            "use norm=layer, rms or none"
        )
    else:
        new = kind.make(_channels(old), shapes, old)
    if isinstance(old, ZeroGain):
        nn.init.zeros_(new.weight)  # pyright: ignore[reportArgumentType]
    if isinstance(old, _BatchNorm) and isinstance(new, _BatchNorm):
        new.track_running_stats = old.track_running_stats
        new.running_mean, new.running_var = old.running_mean, old.running_var
        new.num_batches_tracked = old.num_batches_tracked
    if not isinstance(old, Place):
        _keep_affine(old, new)
    return new


def _keep_affine(old: nn.Module, new: nn.Module) -> None:
    """The very parameters of `old`; a norm without them stays without, one with a gain alone may get a shift of 0."""
    gain, shift = getattr(old, "weight", None), getattr(old, "bias", None)
    if gain is None and shift is None:
        new.register_parameter("weight", None)
        new.register_parameter("bias", None)
    for name, value in (("weight", gain), ("bias", shift)):
        if value is not None:
            setattr(new, name, value)


def _is_channels_first(old: Any, shapes: list[torch.Size]) -> bool:
    flat = bool(shapes) and all(len(shape) == 2 for shape in shapes)
    return isinstance(old, (LayerNorm2d, PixelRMSNorm)) or (flat and len(old.normalized_shape) == 1)


def _channels(old: Any) -> int:
    if isinstance(old, Place):
        return old.features
    if isinstance(old, nn.GroupNorm):
        return old.num_channels
    return old.normalized_shape[0] if isinstance(old, _LAST_AXIS) else old.num_features


def _groups(name: str, channels: int, most: int, shapes: list[torch.Size]) -> int:
    """The largest divisor of `channels` up to `most` that leaves at least two values per group."""
    values = min((shape[1:].numel() for shape in shapes), default=2 * channels)
    for groups in range(min(most, channels), 0, -1):
        if channels % groups == 0 and values // groups >= 2:
            return groups
    fewest_values(name, min(shapes, key=lambda shape: shape[1:].numel()), values)
    raise AssertionError("two values make a group")


def _own(old: nn.Module, name: str, asked: float | None, default: float) -> Any:
    """What the user asked for, or else the layer's own value, or else the default."""
    return asked if asked is not None else getattr(old, name, default)


def _check_batch(momentum: float | None, eps: float | None) -> None:
    if momentum is not None:
        check("momentum", momentum, "[0, 1]")
    if eps is not None:
        check("eps", eps, "(0, inf)")


def _refuse_empty_zero_gains(model: nn.Module, name: str) -> None:
    if any(modules_of(model, ZeroGain)):
        raise InputError(
            f"zero_init_residual needs a norm with a gain at the end of each branch, which norm.{name} does not put "
            "there: use norm=batch, or zero_init_residual=false"
        )


def _refuse_moving(existing: list[tuple[str, Any]]) -> None:
    if existing:
        raise InputError(
            f"position=after_activation cannot move {existing[0][0]}, which stands where its model calls it: "
            "use before_activation, or a knep model built with norm=None"
        )


def _weighted(model: nn.Module, sample: Tensor | None) -> list[tuple[str, Any]]:
    """(path, layer) of all linear layers and convolutions but the classifier, each once."""
    last = classifier_of(model, sample)
    layers = {m: path for path, m in reversed(list(modules_of(model, nn.Linear, _ConvNd)))}
    owners = Counter(id(m.weight) for m in layers)
    for m, path in layers.items():
        if is_parametrized(m, "weight") or owners[id(m.weight)] > 1:
            raise InputError(f"norm cannot reparametrise {path}: its weight is shared or has a parametrisation already")
    return [(path, m) for m, path in reversed(layers.items()) if m is not last]

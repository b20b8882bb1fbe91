"""`norm`: the normalisation layer and its place. `f(model, *, sample, position, insert, **hp)`, in place.

A knep model has a place behind the weights and before the activation ("before_activation") and one behind the
activation ("after_activation"). In any other model the norm layers it has are replaced where they stand, at any depth;
they keep their gains and shifts (the very parameters), and running statistics from one batch kind to another. A layer
that is already of the kind asked for is kept, and listed as kept.

Where the channels are: a norm on axis 1 stays there. One on the last axis of tokens (N, ..., C), as in transformers,
becomes: layer, rms: the same over the last axis; group: over the channel groups of each token; batch, ghost_batch:
over batch and tokens; instance: over the tokens of each image. One over the channels of each pixel, as in ConvNeXt,
becomes layer and rms there, and else the norm of (N, C, H, W).

insert=true: a model without norm layers and places gets a norm behind each linear layer and convolution whose output
an activation reads, but not behind the classifier. It is a child of that layer, whose parameters keep their names.
`sample` shows which those are, or else torch.fx.

Subclasses and look-alikes of norm layers, with what else they do: see `knep.surgery.find_norms`. A module that is
called a norm but is none by its values stays, and is listed as not reached; so does the norm of a part that is frozen
while others are trained, and is listed as kept.

On a sample, a norm is refused that would let later positions of a causal model reach earlier ones, or rows of a batch
each other in eval mode, which the model's own norms do not: see `knep.surgery.influence`.

Each function lists its changes, and raises NoEffectError where there is neither a place nor a norm layer, and
InputError, before the first change, where its statistics make no sense for a layer's signal, or a new layer would lose
something (parametrisations, hooks, an own forward).
sample: a batch as the model takes it (`knep.surgery.sample`), for the shapes that reach each layer; without it they are
checked in the first forward, and leaks are not looked for.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from torchvision.models.convnext import LayerNorm2d

from knep.errors import InputError, NoEffectError
from knep.nn.kinds import is_norm
from knep.nn.norm import (
    BatchNorm,
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    LastRMSNorm,
    PixelRMSNorm,
    RMSNorm,
    TokenBatchNorm,
    TokenGhostBatchNorm,
    TokenGroupNorm,
    TokenInstanceNorm,
    WeightStandardization,
    fewest_values,
)
from knep.nn.place import Place
from knep.surgery.edit import Change, bare, describe, frozen_parts, modules_of
from knep.surgery.record import classifier_of
from knep.surgery.replace_norms import Kind, Site, normalise, refuse_empty_zero_gains
from knep.surgery.sample import Inputs
from knep.utils.validation import check, whole

__all__ = [
    "auto",
    "batch",
    "ghost_batch",
    "group",
    "instance",
    "layer",
    "none",
    "rms",
    "spectral",
    "weight",
    "weight_standardization",
]

_BESIDE = ("group", "batch", "none")


def none(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Leaves the places empty and the model's own norm layers alone."""
    refuse_empty_zero_gains(model, "none")
    return []


def auto(
    model: nn.Module,
    *,
    sample: Inputs | None = None,
    position: str = "before_activation",
    insert: bool = False,
    momentum: float | None = None,
    eps: float | None = None,
) -> list[Change]:
    """Batch norm in the places of a knep model; elsewhere the norms that a model has, which its authors chose.

    A model without norm layers stays without, and the report says so; with insert=true it gets batch norm behind
    convolutions and linear layers of rows (Ioffe and Szegedy 2015), layer norm behind those of tokens (Ba et al. 2016).
    No later position and no other row comes into a signal by it that was not there.

    momentum, eps: as for `batch`, of the model's own batch norms too; other norms keep theirs.
    """
    _check_batch(momentum, eps)
    model = bare(model)

    def kept(old: Any) -> bool:
        own = isinstance(old, _BatchNorm) and not isinstance(old, GhostBatchNorm)
        return not own or (momentum in (None, old.momentum) and eps in (None, old.eps))

    def first(site: Site) -> nn.Module:
        return BatchNorm(site.channels, eps=site.eps(eps, 1e-5), momentum=_momentum(site.old, momentum))

    def last(site: Site) -> nn.Module:
        return nn.LayerNorm(site.shape, eps=site.eps(eps, 1e-5))

    own = [Change(path, describe(m), "kept") for path, m in modules_of(model, nn.Module) if is_norm(m)]
    has_place = any(modules_of(model, Place))
    asked = position != "before_activation" or (momentum, eps) != (None, None)
    if has_place or (own and asked) or (insert and not own):
        return normalise(model, Kind("auto", kept, first, last), sample, position, insert)
    hint = "norm.insert=true puts one behind each layer that an activation follows"
    return own or [Change("the model", type(model).__name__, f"kept: it has no norm layer, and {hint}")]


def batch(
    model: nn.Module,
    *,
    sample: Inputs | None = None,
    position: str = "before_activation",
    insert: bool = False,
    momentum: float | None = None,
    eps: float | None = None,
) -> list[Change]:
    """Gives each channel mean 0 and variance 1 over batch and pixels (Ioffe and Szegedy 2015), running ones in eval.

    momentum: weight of the new batch in the running statistics, in [0, 1]; eps: added to the variance, in (0, inf).
    None is the layer's own value, and 0.1 and 1e-5 in a place.
    """
    _check_batch(momentum, eps)

    def kept(old: nn.Module) -> bool:
        own = isinstance(old, _BatchNorm) and not isinstance(old, GhostBatchNorm)
        return own and momentum in (None, old.momentum) and eps in (None, old.eps)

    def make(site: Site, cls: type[BatchNorm] = BatchNorm) -> nn.Module:
        return cls(site.channels, eps=site.eps(eps, 1e-5), momentum=_momentum(site.old, momentum))

    kind = Kind("batch", kept, make, lambda site: make(site, TokenBatchNorm))
    return normalise(model, kind, sample, position, insert)


def ghost_batch(
    model: nn.Module,
    *,
    sample: Inputs | None = None,
    position: str = "before_activation",
    insert: bool = False,
    ghost_size: int = 32,
    momentum: float | None = None,
    eps: float | None = None,
) -> list[Change]:
    """Batch norm over parts of at least ghost_size images, as if the batch were that small (Hoffer et al. 2017).

    ghost_size: images, from 2 on. momentum, eps: as for `batch`.
    """
    whole("ghost_size", ghost_size, 2)
    _check_batch(momentum, eps)

    def kept(old: nn.Module) -> bool:
        own = isinstance(old, GhostBatchNorm) and old.ghost_size == ghost_size
        return own and momentum in (None, old.momentum) and eps in (None, old.eps)

    def make(site: Site, cls: type[GhostBatchNorm] = GhostBatchNorm) -> nn.Module:
        own = {"eps": site.eps(eps, 1e-5), "momentum": _momentum(site.old, momentum)}
        return cls(site.channels, ghost_size=ghost_size, **own)

    kind = Kind("ghost_batch", kept, make, lambda site: make(site, TokenGhostBatchNorm))
    return normalise(model, kind, sample, position, insert)


def layer(
    model: nn.Module,
    *,
    sample: Inputs | None = None,
    position: str = "before_activation",
    insert: bool = False,
    eps: float | None = None,
) -> list[Change]:
    """Gives each image's signal mean 0 and variance 1 over all channels and pixels (Ba et al. 2016).

    Where a model normalises its last axis, or the channels of each pixel, the new norm does the same.

    eps: added to the variance, in (0, inf); None is the layer's own value, and 1e-5 in a place.
    """
    _check_eps(eps)

    def kept(old: nn.Module) -> bool:
        one = isinstance(old, nn.LayerNorm) or (isinstance(old, nn.GroupNorm) and old.num_groups == 1)
        return one and eps in (None, old.eps)

    def first(site: Site) -> nn.Module:
        return GroupNorm(_groups("layer", site, 1), site.channels, eps=site.eps(eps, 1e-5))

    def last(site: Site, cls: type[nn.LayerNorm] = nn.LayerNorm) -> nn.Module:
        return cls(site.shape, eps=site.eps(eps, 1e-5))

    kind = Kind("layer", kept, first, last, lambda site: last(site, LayerNorm2d), joint=True)
    return normalise(model, kind, sample, position, insert)


def group(
    model: nn.Module,
    *,
    sample: Inputs | None = None,
    position: str = "before_activation",
    insert: bool = False,
    groups: int = 8,
    eps: float | None = None,
) -> list[Change]:
    """Gives each group of channels of each image, or of each token, mean 0 and variance 1 (Wu and He 2018).

    groups: how many, from 1 on; a layer has the largest divisor of its channels up to there that leaves two values per
    group. eps: added to the variance, in (0, inf); None is the layer's own value, and 1e-5 in a place.
    """
    whole("groups", groups, 1)
    _check_eps(eps)

    def kept(old: nn.Module) -> bool:
        return isinstance(old, nn.GroupNorm) and old.num_groups == groups and eps in (None, old.eps)

    def first(site: Site) -> nn.Module:
        return GroupNorm(_groups("group", site, groups), site.channels, eps=site.eps(eps, 1e-5))

    def last(site: Site) -> nn.Module:
        token = replace(site, shapes=[torch.Size((1, site.channels))])
        return TokenGroupNorm(_groups("group", token, groups), site.channels, eps=site.eps(eps, 1e-5))

    return normalise(model, Kind("group", kept, first, last), sample, position, insert)


def instance(
    model: nn.Module,
    *,
    sample: Inputs | None = None,
    position: str = "before_activation",
    insert: bool = False,
    eps: float | None = None,
) -> list[Change]:
    """Gives each channel of each image mean 0 and variance 1 over its pixels or tokens (Ulyanov et al. 2016).

    eps: added to the variance, in (0, inf); None is the layer's own value, and 1e-5 in a place.
    Refuses a signal with one value per channel.
    """
    _check_eps(eps)

    def kept(old: nn.Module) -> bool:
        return isinstance(old, _InstanceNorm) and eps in (None, old.eps)

    def first(site: Site) -> nn.Module:
        for shape in site.shapes:
            fewest_values("instance", shape, shape[2:].numel(), site.path)
        return InstanceNorm(site.channels, eps=site.eps(eps, 1e-5), affine=True)

    def last(site: Site) -> nn.Module:
        for shape in site.shapes:
            fewest_values("instance", shape, shape[1:-1].numel(), site.path)
        return TokenInstanceNorm(site.channels, eps=site.eps(eps, 1e-5), affine=True)

    return normalise(model, Kind("instance", kept, first, last), sample, position, insert)


def rms(
    model: nn.Module,
    *,
    sample: Inputs | None = None,
    position: str = "before_activation",
    insert: bool = False,
    eps: float | None = None,
) -> list[Change]:
    """Divides each image's signal by its root mean square; the mean stays (Zhang and Sennrich 2019).

    Where a model normalises its last axis, or the channels of each pixel, the new norm does the same.

    eps: added to the mean square, in (0, inf); None is the layer's own value, and 1e-6 in a place.
    """
    _check_eps(eps)

    def kept(old: nn.Module) -> bool:
        return isinstance(old, (nn.RMSNorm, RMSNorm)) and eps in (None, old.eps)

    def first(site: Site) -> nn.Module:
        return RMSNorm(site.channels, eps=site.eps(eps, 1e-6))

    def last(site: Site, cls: type[LastRMSNorm] = LastRMSNorm) -> nn.Module:
        return cls(site.shape, eps=site.eps(eps, 1e-6))

    kind = Kind("rms", kept, first, last, lambda site: last(site, PixelRMSNorm), joint=True, shifts=False)
    return normalise(model, kind, sample, position, insert)


def weight(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Splits each unit's weights into length and direction, w = g v / ||v|| (Salimans and Kingma 2016).

    Acts on all linear layers and convolutions but the classifier; the function stays as it was. Places stay empty.
    """
    model = bare(model)
    refuse_empty_zero_gains(model, "weight")
    changes = []
    found, left = _weighted(model, sample, "norm.weight")
    for path, m in found:
        parametrizations.weight_norm(m, "weight", dim=1 if isinstance(m, _ConvTransposeNd) else 0)
        changes.append(Change(f"{path}.weight", "free", "g v / ||v||"))
    return changes + left


def spectral(
    model: nn.Module, *, sample: Inputs | None = None, n_power_iterations: int = 1, eps: float = 1e-12
) -> list[Change]:
    """Divides each weight matrix by its largest singular value, so that no layer stretches (Miyato et al. 2018).

    Acts on all linear layers and convolutions but the classifier. Places stay empty.

    n_power_iterations: steps of the estimate per training forward, from 1 on. eps: least length, in (0, inf).
    """
    whole("n_power_iterations", n_power_iterations, 1)
    check("eps", eps, "(0, inf)")
    model = bare(model)
    refuse_empty_zero_gains(model, "spectral")
    changes = []
    found, left = _weighted(model, sample, "norm.spectral")
    for path, m in found:
        parametrizations.spectral_norm(m, "weight", n_power_iterations=n_power_iterations, eps=eps)
        changes.append(Change(f"{path}.weight", "free", "w / sigma(w)"))
    return changes + left


def weight_standardization(
    model: nn.Module, *, sample: Inputs | None = None, beside: str = "group", groups: int = 32, eps: float = 1e-5
) -> list[Change]:
    """Gives the weights of each filter mean 0 and variance 1, over its channels and taps (Qiao et al. 2019).

    Acts on all convolutions; the filters of depthwise 1 x 1 ones, of one weight each, stay. For small batches it
    stands with a group norm, which takes the places and the model's own norms as `norm=group` does.

    beside: group, batch or none, which leaves places empty and the model's norms alone; groups: of group norm.
    eps: added to the variance, in (0, inf). Raises InputError for others.
    """
    check("eps", eps, "(0, inf)")
    if beside not in _BESIDE:
        raise InputError(f"beside must be one of {', '.join(_BESIDE)}, got {beside}")
    model = bare(model)
    found, left = _weighted(model, sample, "norm.weight_standardization", (_ConvNd,))
    lone = [path for path, m in found if m.weight[0].numel() == 1]
    left += [Change(f"{path}.weight", "free", "left as it is: a filter of one weight has no spread") for path in lone]
    found = [(path, m) for path, m in found if path not in lone]
    if not found:
        raise NoEffectError(f"norm.weight_standardization changed nothing: {left[0].path} is {left[0].after}")
    if beside == "none":
        refuse_empty_zero_gains(model, "weight_standardization")
    fill = {"group": partial(group, groups=groups), "batch": batch, "none": lambda model, sample: []}[beside]
    changes = fill(model, sample=sample)
    for path, m in found:
        transposed = m.groups if isinstance(m, _ConvTransposeNd) else None
        register_parametrization(m, "weight", WeightStandardization(eps, transposed))
        changes.append(Change(f"{path}.weight", "free", "(w - mean) / std of each filter"))
    return changes + left


def _groups(name: str, site: Site, most: int) -> int:
    """The largest divisor of the channels up to `most` that leaves at least two values per group."""
    values = min((shape[1:].numel() for shape in site.shapes), default=2 * site.channels)
    for groups in range(min(most, site.channels), 0, -1):
        if site.channels % groups == 0 and values // groups >= 2:
            return groups
    fewest_values(name, min(site.shapes, key=lambda shape: shape[1:].numel()), values, site.path)
    raise AssertionError("two values make a group")


def _momentum(old: nn.Module, asked: float | None) -> float | None:
    """What the user asked for, or else the layer's own value (None: the average of all batches), or else 0.1."""
    return asked if asked is not None else getattr(old, "momentum", 0.1)


def _check_batch(momentum: float | None, eps: float | None) -> None:
    if momentum is not None:
        check("momentum", momentum, "[0, 1]")
    _check_eps(eps)


def _check_eps(eps: float | None) -> None:
    if eps is not None:
        check("eps", eps, "(0, inf)")


def _weighted(
    model: nn.Module, sample: Inputs | None, name: str, kinds: tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd)
) -> tuple[list[tuple[str, Any]], list[Change]]:
    """(path, layer) of all linear layers and convolutions but the classifier, each once; and what is left, and why.

    kinds: of layers to look at.

    Raises NoEffectError where none is left to change.
    """
    last = classifier_of(model, sample)
    layers = {m: path for path, m in reversed(list(modules_of(model, *kinds)))}
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    is_frozen = frozen_parts(model)
    found, left = [], []
    for m, path in reversed(layers.items()):
        if m is last:
            continue
        reason = _reason(m, owners[id(m.weight)] > 1, is_frozen(path))
        if reason:
            left.append(Change(f"{path}.weight", "free", f"left as it is: {reason}"))
        else:
            found.append((path, m))
    why = (
        f"{left[0].path} is {left[0].after}"
        if left
        else f"the model has no {'linear layer or ' * (nn.Linear in kinds)}convolution but its classifier"
    )
    if not found:
        raise NoEffectError(f"{name} changed nothing: {why}")
    return found, left


def _reason(layer: Any, shared: bool, frozen: bool) -> str:
    """Why a layer's weight cannot be split or divided, or ""."""
    if frozen:
        return "frozen"
    if is_parametrized(layer, "weight"):
        return "it has a parametrisation already"
    if "weight" not in layer._parameters:  # as torch.nn.utils.weight_norm leaves it
        return "a hook computes it, use torch.nn.utils.parametrizations"
    if shared:
        return "it is shared with another layer"
    if not layer.weight.is_meta and not layer.weight.detach().any():
        return "all zero, it has no direction"
    return ""

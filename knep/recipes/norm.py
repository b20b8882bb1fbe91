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
an activation reads, but not behind the classifier. `sample` shows which those are, or else torch.fx.

Subclasses and look-alikes of norm layers, with what else they do: see `knep.surgery.find_norms`. A module that is
called a norm but is none by its values stays, and is listed as not reached.

Each function lists its changes, and raises NoEffectError where there is neither a place nor a norm layer, and
InputError, before the first change, where its statistics make no sense for a layer's signal, or a new layer would lose
something (parametrisations, hooks, an own forward).
sample: images (N, C, H, W), for the shapes that reach each layer; without it they are checked in the first forward.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from torchvision.models.convnext import LayerNorm2d

from knep.errors import InputError
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
    fewest_values,
)
from knep.surgery.edit import Change, bare, modules_of, required
from knep.surgery.record import classifier_of
from knep.surgery.replace_norms import Kind, Site, normalise, refuse_empty_zero_gains
from knep.utils.validation import check, whole

__all__ = ["batch", "ghost_batch", "group", "instance", "layer", "none", "rms", "spectral", "weight"]


def none(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Leaves the places empty and the model's own norm layers alone."""
    refuse_empty_zero_gains(model, "none")
    return []


def batch(
    model: nn.Module,
    *,
    sample: Tensor | None = None,
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

    def kept(old: Any) -> bool:
        own = isinstance(old, _BatchNorm) and not isinstance(old, GhostBatchNorm)
        return own and momentum in (None, old.momentum) and eps in (None, old.eps)

    def make(site: Site, cls: type[BatchNorm] = BatchNorm) -> nn.Module:
        return cls(site.channels, eps=site.eps(eps, 1e-5), momentum=_momentum(site.old, momentum))

    kind = Kind("batch", kept, make, lambda site: make(site, TokenBatchNorm))
    return normalise(model, kind, sample, position, insert)


def ghost_batch(
    model: nn.Module,
    *,
    sample: Tensor | None = None,
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

    def kept(old: Any) -> bool:
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
    sample: Tensor | None = None,
    position: str = "before_activation",
    insert: bool = False,
    eps: float | None = None,
) -> list[Change]:
    """Gives each image's signal mean 0 and variance 1 over all channels and pixels (Ba et al. 2016).

    Where a model normalises its last axis, or the channels of each pixel, the new norm does the same.

    eps: added to the variance, in (0, inf); None is the layer's own value, and 1e-5 in a place.
    """
    _check_eps(eps)

    def kept(old: Any) -> bool:
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
    sample: Tensor | None = None,
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

    def kept(old: Any) -> bool:
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
    sample: Tensor | None = None,
    position: str = "before_activation",
    insert: bool = False,
    eps: float | None = None,
) -> list[Change]:
    """Gives each channel of each image mean 0 and variance 1 over its pixels or tokens (Ulyanov et al. 2016).

    eps: added to the variance, in (0, inf); None is the layer's own value, and 1e-5 in a place.
    Refuses a signal with one value per channel.
    """
    _check_eps(eps)

    def kept(old: Any) -> bool:
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
    sample: Tensor | None = None,
    position: str = "before_activation",
    insert: bool = False,
    eps: float | None = None,
) -> list[Change]:
    """Divides each image's signal by its root mean square; the mean stays (Zhang and Sennrich 2019).

    Where a model normalises its last axis, or the channels of each pixel, the new norm does the same.

    eps: added to the mean square, in (0, inf); None is the layer's own value, and 1e-6 in a place.
    """
    _check_eps(eps)

    def kept(old: Any) -> bool:
        return isinstance(old, (nn.RMSNorm, RMSNorm)) and eps in (None, old.eps)

    def first(site: Site) -> nn.Module:
        return RMSNorm(site.channels, eps=site.eps(eps, 1e-6))

    def last(site: Site, cls: type[LastRMSNorm] = LastRMSNorm) -> nn.Module:
        return cls(site.shape, eps=site.eps(eps, 1e-6))

    kind = Kind("rms", kept, first, last, lambda site: last(site, PixelRMSNorm), joint=True, shifts=False)
    return normalise(model, kind, sample, position, insert)


def weight(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Splits each unit's weights into length and direction, w = g v / ||v|| (Salimans and Kingma 2016).

    Acts on all linear layers and convolutions but the classifier; the function stays as it was. Places stay empty.
    """
    model = bare(model)
    refuse_empty_zero_gains(model, "weight")
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
    model = bare(model)
    refuse_empty_zero_gains(model, "spectral")
    changes = []
    for path, m in _weighted(model, sample):
        parametrizations.spectral_norm(m, "weight", n_power_iterations=n_power_iterations, eps=eps)
        changes.append(Change(f"{path}.weight", "free", "w / sigma(w)"))
    return required(changes, "norm.spectral", "the model has no linear layer or convolution but its classifier")


def _groups(name: str, site: Site, most: int) -> int:
    """The largest divisor of the channels up to `most` that leaves at least two values per group."""
    values = min((shape[1:].numel() for shape in site.shapes), default=2 * site.channels)
    for groups in range(min(most, site.channels), 0, -1):
        if site.channels % groups == 0 and values // groups >= 2:
            return groups
    fewest_values(name, min(site.shapes, key=lambda shape: shape[1:].numel()), values, site.path)
    raise AssertionError("two values make a group")


def _momentum(old: nn.Module, asked: float | None) -> Any:
    """What the user asked for, or else the layer's own value (None: the average of all batches), or else 0.1."""
    return asked if asked is not None else getattr(old, "momentum", 0.1)


def _check_batch(momentum: float | None, eps: float | None) -> None:
    if momentum is not None:
        check("momentum", momentum, "[0, 1]")
    _check_eps(eps)


def _check_eps(eps: float | None) -> None:
    if eps is not None:
        check("eps", eps, "(0, inf)")


def _weighted(model: nn.Module, sample: Tensor | None) -> list[tuple[str, Any]]:
    """(path, layer) of all linear layers and convolutions but the classifier, each once."""
    last = classifier_of(model, sample)
    layers = {m: path for path, m in reversed(list(modules_of(model, nn.Linear, _ConvNd)))}
    owners = Counter(id(m.weight) for m in layers)
    for m, path in layers.items():
        if is_parametrized(m, "weight") or owners[id(m.weight)] > 1:
            raise InputError(f"norm cannot reparametrise {path}: its weight is shared or has a parametrisation already")
    return [(path, m) for m, path in reversed(layers.items()) if m is not last]

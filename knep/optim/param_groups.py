"""Which parameters are trained, which of them decay, and at what rate: the named groups that every optimizer gets.

Weight decay holds for the weights of linear layers and convolutions alone. Norms, biases and other vectors,
embeddings, class tokens, position tables and layer scales have none: to shrink them shrinks no function.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from knep.errors import InputError
from knep.nn.kinds import is_norm
from knep.surgery.edit import unwrapped
from knep.surgery.layer_depth import depths_of
from knep.surgery.sample import Inputs
from knep.utils.validation import check

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_WEIGHTS = (nn.Linear, _ConvNd, nn.Bilinear)
# Names of parameters that are no weights: any of these, or one of these words between underscores.
_NO_WEIGHT_NAMES = ("bias", "token", "position", "embed", "layer_scale")
_NO_WEIGHT_WORDS = {"pos", "scale", "gamma", "cls", "temperature", "relpos", "gain"}


def _decays(model: nn.Module, name: str, parameter: Tensor) -> bool:
    path, _, short = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, ParametrizationList):
        # original0 of weight normalization holds gains: one number per unit, in the shape (units, 1, ...)
        # torch.nn.utils.parametrizations.orthogonal keeps signs on the diagonal, which nothing may shrink or turn.
        orthogonal = any(type(made).__name__ == "_Orthogonal" for made in owner)
        return short != "original0" and parameter.ndim > 1 and not orthogonal
    if isinstance(owner, _WEIGHTS):
        return parameter.ndim > 1
    a_vector = sum(size > 1 for size in parameter.shape) < 2
    named_so = any(word in short for word in _NO_WEIGHT_NAMES) or bool(_NO_WEIGHT_WORDS & set(short.split("_")))
    return not (a_vector or named_so or is_norm(owner) or isinstance(owner, _EMBEDDINGS))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter in module order; a parameter shared by two layers once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _registered_depths(names: dict[str, bool]) -> dict[str, int]:
    """Depth of each parameter, from its name and whether it decays: every layer with weights is one deeper.

    What has no weights to decay (a norm, a class token) has the depth of the layer before it, or 0.
    """
    layer_of = {name: name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
                for name in names}  # fmt: skip
    weighty = {layer_of[name] for name, decays in names.items() if decays}
    order = [layer for layer in dict.fromkeys(layer_of.values()) if layer in weighty]
    depths, depth = {}, 0
    for name, layer in layer_of.items():
        depth = order.index(layer) if layer in weighty else depth
        depths[name] = depth
    return depths


def _measured_depths(model: nn.Module, sample: Inputs, names: Collection[str]) -> tuple[dict[str, int], list[str]]:
    """Depth of each named parameter when the model reads the sample, and the names of those that it does not reach.

    These have the depth of the parameter registered before them.
    """
    weights = {id(p) for name, p in model.named_parameters() if _decays(model, name, p)}
    found = depths_of(model, sample, lambda p: id(p) in weights)
    deep, depth, unreached = {}, 0, []
    for name, p in model.named_parameters():
        depth = found.get(id(p), depth)
        if name in names:
            deep[name] = depth
            unreached += [] if id(p) in found else [name]
    return deep, unreached


def depths(
    model: nn.Module, sample: Inputs | None = None, names: Collection[str] | None = None
) -> tuple[dict[str, int], list[str]]:
    """Depth of each trained parameter, and the names of those that have no path to an output ([] without a sample).

    Depth is the number of layers with weights on the longest path to it when the model reads the sample; without one
    the order in which modules are registered. names: of the parameters that are asked for, None for those that are
    trained. Raises InputError when there is none.
    """
    chosen = {name: p for name, p in model.named_parameters() if (p.requires_grad if names is None else name in names)}
    if not chosen:
        raise InputError("the model has no trained parameters: every one has requires_grad=False, or there are none")
    if sample is not None:
        return _measured_depths(model, sample, chosen)
    return _registered_depths({name: _decays(model, name, p) for name, p in chosen.items()}), []


def in_blocks(model: nn.Module, deep: Mapping[str, int]) -> dict[str, int]:
    """The depths with all of a block at that of its first layer.

    A block is a module of several layers with weights, in an `nn.Sequential` or `nn.ModuleList` half of whose modules
    or more have its class, as the residual blocks of a ResNet and the blocks of a transformer are; of blocks in one
    another the innermost. What lies outside of all has the depth of the block or layer before it.
    """
    blocks = _blocks(model)
    owners = {name: max((b for b in blocks if name.startswith(f"{b}.")), key=len, default="") for name in deep}
    weights = {name for name, p in model.named_parameters() if name in deep and _decays(model, name, p)}
    first: dict[str, int] = {}
    for name, depth in sorted(deep.items(), key=lambda item: item[0] not in weights):
        if owners[name] and (name in weights or owners[name] not in first):  # a norm before has the depth before
            first[owners[name]] = min(depth, first.get(owners[name], depth))
    covered = {depth for name, depth in deep.items() if owners[name]} - set(first.values())
    starts = sorted({*first.values(), *(depth for name, depth in deep.items() if not owners[name])} - covered)
    return {
        name: first[owners[name]] if owners[name] else max((s for s in starts if s <= depth), default=depth)
        for name, depth in deep.items()
    }


def _blocks(model: nn.Module) -> list[str]:
    """Paths of the modules that are blocks, outer ones first."""
    found = []
    for path, outer in model.named_modules():
        if not isinstance(outer, (nn.Sequential, nn.ModuleList)):
            continue
        kinds = [type(child) for child in outer.children()]
        for name, child in outer.named_children():
            repeated = 2 * kinds.count(type(child)) >= len(kinds) and type(child) not in (nn.Sequential, nn.ModuleList)
            if repeated and sum(isinstance(m, (*_WEIGHTS, nn.MultiheadAttention)) for m in child.modules()) > 1:
                found.append(f"{path}.{name}" if path else name)
    return found


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    sample: Inputs | None = None,
    factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters of any model as groups for a `torch.optim` optimizer.

    Two groups, "decay" and "no_decay"; with layer_decay < 1 two for each depth, named "layer3.decay", whose rate is
    lr * layer_decay ** (layers behind it), so that the last layer has lr itself (Clark et al. 2020, sec. 3.2). Depth is
    the number of layers with weights on the longest path to a parameter when the model reads the sample
    (`knep.surgery.layer_depth`); without a sample it is the order in which modules are registered. Empty groups are
    left out.

    Each group holds params, param_names, name, lr, weight_decay, decayed (False where weight_decay is 0 by rule) and
    unreached, the names of parameters that have no path to an output (always empty without a sample).

    lr: in (0, inf); weight_decay: in [0, inf); layer_decay: factor per layer, in (0, 1]; sample: as for `Recipe.apply`.
    factors: parameter -> further factor on its rate, of those that are to be in groups, frozen for now or not; where
    they differ, each has two groups, "rate0.decay" the slowest; None for all that are trained, at 1.
    Raises InputError for values outside, or when no parameter of the model is trained.
    """
    check("lr", lr, "(0, inf)")
    check("weight_decay", weight_decay, "[0, inf)")
    check("layer_decay", layer_decay, "(0, 1]")
    model = unwrapped(model)
    deep, unreached = depths(model, sample, factors)
    chosen = {name: p for name, p in model.named_parameters() if name in deep}
    shares = {name: 1.0 if factors is None else factors[name] for name in chosen}
    steps = sorted(set(shares.values()))
    last = max(deep.values())
    groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
    for name, p in chosen.items():
        depth, share, decayed = deep[name] if layer_decay < 1 else 0, shares[name], _decays(model, name, p)
        group = groups.setdefault((depth, share, not decayed), {"params": [], "param_names": [], "decayed": decayed})
        group["params"].append(p)
        group["param_names"].append(name)
        prefix = f"layer{depth}." if layer_decay < 1 else ""
        prefix += f"rate{steps.index(share)}." if len(steps) > 1 else ""
        group["name"] = prefix + ("decay" if decayed else "no_decay")
        group["lr"] = lr * layer_decay ** (last - depth if layer_decay < 1 else 0) * share
        group["weight_decay"] = weight_decay if decayed else 0.0
        group["unreached"] = [*group.get("unreached", []), *([name] if name in unreached else [])]
    return [groups[key] for key in sorted(groups)]


def decayed(model: nn.Module) -> list[Tensor]:
    """The trained weights that decay and that penalties act on, each once, in module order."""
    model = unwrapped(model)
    return [p for name, p in _trained(model).items() if _decays(model, name, p)]


def rate(optimizer: Optimizer) -> float:
    """The head's learning rate: the largest where layers decay towards the input."""
    return max(float(group["lr"]) for group in optimizer.param_groups)

"""Which parameters are trained, which of them decay, and at what rate: the named groups that every optimizer gets.

Weight decay holds for the weights of linear layers and convolutions alone. Norms, biases and other vectors,
embeddings, class tokens, position tables and layer scales have none: to shrink them shrinks no function.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from knep.errors import InputError
from knep.nn.kinds import is_norm
from knep.surgery.edit import bare
from knep.surgery.layer_depth import depths_of
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
        return short != "original0" and parameter.ndim > 1
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


def _measured_depths(model: nn.Module, sample: Tensor) -> tuple[dict[str, int], list[str]]:
    """Depth of each trained parameter when the model reads the sample, and the names of those that it does not reach.

    These have the depth of the parameter registered before them.
    """
    weights = {id(p) for name, p in model.named_parameters() if _decays(model, name, p)}
    found = depths_of(model, sample, lambda p: id(p) in weights)
    depths, depth, unreached = {}, 0, []
    for name, p in model.named_parameters():
        depth = found.get(id(p), depth)
        if p.requires_grad:
            depths[name] = depth
            unreached += [] if id(p) in found else [name]
    return depths, unreached


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0, sample: Tensor | None = None
) -> list[dict[str, Any]]:
    """The trained parameters of any model as groups for a `torch.optim` optimizer.

    Two groups, "decay" and "no_decay"; with layer_decay < 1 two for each depth, named "layer3.decay", whose rate is
    lr * layer_decay ** (layers behind it), so that the last layer has lr itself (Clark et al. 2020, sec. 3.2). Depth is
    the number of layers with weights on the longest path to a parameter when the model reads the sample
    (`knep.surgery.layer_depth`); without a sample it is the order in which modules are registered. Empty groups are
    left out.

    Each group holds params, param_names, name, lr, weight_decay, decayed (False where weight_decay is 0 by rule) and
    unreached, the names of parameters that have no path to an output (always empty without a sample).

    lr: in (0, inf); weight_decay: in [0, inf); layer_decay: factor per layer, in (0, 1]; sample: images (N, C, H, W).
    Raises InputError for values outside, or when no parameter of the model is trained.
    """
    check("lr", lr, "(0, inf)")
    check("weight_decay", weight_decay, "[0, inf)")
    check("layer_decay", layer_decay, "(0, 1]")
    model = bare(model)
    trained = _trained(model)
    if not trained:
        raise InputError("the model has no trained parameters: every one has requires_grad=False, or there are none")
    decays = {name: _decays(model, name, p) for name, p in trained.items()}
    depths, unreached = (_registered_depths(decays), []) if sample is None else _measured_depths(model, sample)
    if layer_decay == 1:
        depths = dict.fromkeys(trained, 0)
    last = max(depths.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, p in trained.items():
        depth, decayed = depths[name], decays[name]
        group = groups.setdefault((depth, not decayed), {"params": [], "param_names": [], "decayed": decayed})
        group["params"].append(p)
        group["param_names"].append(name)
        group["name"] = (f"layer{depth}." if layer_decay < 1 else "") + ("decay" if decayed else "no_decay")
        group["lr"] = lr * layer_decay ** (last - depth)
        group["weight_decay"] = weight_decay if decayed else 0.0
        group["unreached"] = [*group.get("unreached", []), *([name] if name in unreached else [])]
    return [groups[key] for key in sorted(groups)]


def decayed(model: nn.Module) -> list[Tensor]:
    """The trained weights that decay and that penalties act on, each once, in module order."""
    model = bare(model)
    return [p for name, p in _trained(model).items() if _decays(model, name, p)]


def summary(groups: list[dict[str, Any]]) -> list[str]:
    """One line per group: name, tensors, parameters, learning rate, weight decay, what no output depends on."""
    return [
        f"{g['name']}: {len(g['params'])} tensors, {sum(p.numel() for p in g['params']):,} parameters, "
        f"lr {g['lr']:.4g}, weight decay {g['weight_decay']:.4g}"
        + (f", not reached by the sample in eval mode: {', '.join(g['unreached'])}" if g.get("unreached") else "")
        for g in groups
    ]

"""Which parameters are trained, which of them decay, and at what rate: the named groups that every optimizer gets.

Weight decay holds for the weights of linear layers and convolutions alone. Norms, biases and other vectors,
embeddings, class tokens, position tables and layer scales have none: to shrink them shrinks no function.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from knep.errors import InputError
from knep.ranges import check

_NO_WEIGHTS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
_NO_WEIGHT_NAMES = ("bias", "token", "position", "pos_emb", "layer_scale")


def _decays(model: nn.Module, name: str, parameter: Tensor) -> bool:
    path, _, short = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, ParametrizationList) and short == "original0":
        return False  # the gains of weight normalization: one number per unit, in the shape (units, 1, ...)
    named_so = any(word in short for word in _NO_WEIGHT_NAMES)
    return parameter.ndim > 1 and not isinstance(owner, _NO_WEIGHTS) and not named_so


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter in module order; a parameter shared by two layers once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _depths(names: dict[str, bool]) -> dict[str, int]:
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


def param_groups(model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """The trained parameters of any model as groups for a `torch.optim` optimizer.

    Two groups, "decay" and "no_decay"; with layer_decay < 1 two for each layer with weights, named "layer3.decay",
    whose rate is lr * layer_decay ** (layers behind it), so that the last layer has lr itself (Clark et al. 2020,
    sec. 3.2). Depth is the order in which modules are registered. Empty groups are left out.

    Each group holds params, param_names, name, lr, weight_decay and decayed (False where weight_decay is 0 by rule).

    lr: in (0, inf); weight_decay: in [0, inf); layer_decay: factor per layer, in (0, 1].
    Raises InputError for values outside, or when no parameter of the model is trained.
    """
    check("lr", lr, "(0, inf)")
    check("weight_decay", weight_decay, "[0, inf)")
    check("layer_decay", layer_decay, "(0, 1]")
    trained = _trained(model)
    if not trained:
        raise InputError("the model has no trained parameters: every one has requires_grad=False, or there are none")
    decays = {name: _decays(model, name, p) for name, p in trained.items()}
    depths = _depths(decays) if layer_decay < 1 else dict.fromkeys(trained, 0)
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
    return [groups[key] for key in sorted(groups)]


def decayed(model: nn.Module) -> list[Tensor]:
    """The trained weights that decay and that penalties act on, each once, in module order."""
    return [p for name, p in _trained(model).items() if _decays(model, name, p)]


def summary(groups: list[dict[str, Any]]) -> list[str]:
    """One line per group: name, tensors, parameters, learning rate, weight decay."""
    return [
        f"{g['name']}: {len(g['params'])} tensors, {sum(p.numel() for p in g['params']):,} parameters, "
        f"lr {g['lr']:.4g}, weight decay {g['weight_decay']:.4g}"
        for g in groups
    ]

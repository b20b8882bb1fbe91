"""`dropout`: its kind, rate and place. `f(model, *, sample, p, **hp)` edits the model in place.

p is the share of what is dropped, in [0, 1); the rest is scaled so that the mean stays. All kinds are the identity in
eval mode, and bit for bit at p = 0. A knep model has places for each kind; in any other model each kind has the rule
that its function states.

Each function lists its changes, and raises NoEffectError where the model has nothing that fits, and InputError for a p
outside [0, 1) or where the right place cannot be proved. sample: images (N, C, H, W), read by the rules for other
models.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from operator import add, iadd
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision import ops

from knep.errors import InputError
from knep.layers import ACTIVATIONS, GATES, DropBlock, RMSNorm, StochasticDepth, calls, classifier_of
from knep.ranges import check
from knep.surgery import Change, Place, describe, modules_of, replace, replace_each, required

__all__ = ["alpha", "dropblock", "none", "spatial", "standard", "stochastic_depth"]

_VALUES = (nn.Dropout, nn.AlphaDropout)
_MAPS = (nn.Dropout2d, DropBlock)
# Modules whose second axis is channels.
_CHANNELS_FIRST = (
    nn.Conv2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.GroupNorm,
    _BatchNorm,
    _InstanceNorm,
    RMSNorm,
)
_WHERE = ("hidden", "head", "features")


def none(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Leaves the places empty and the model's own dropout alone."""
    return []


def standard(
    model: nn.Module, *, sample: Tensor | None = None, p: float = 0.5, where: Sequence[str] = ("hidden", "head")
) -> list[Change]:
    """Zeroes each value with probability p and divides the rest by 1 - p (Srivastava et al. 2014).

    Without places: the model's own Dropout modules get p; if it has none, one is put before the classifier.

    where: places to fill, of hidden (behind hidden linear layers), head (before the classifier) and features (behind
    convolution stages).
    """
    return _drop_values(model, sample, "standard", p, where, nn.Dropout)


def alpha(
    model: nn.Module, *, sample: Tensor | None = None, p: float = 0.1, where: Sequence[str] = ("hidden", "head")
) -> list[Change]:
    """Sets values to SELU's limit at minus infinity, then restores mean and variance (Klambauer et al. 2017).

    The dropout for `activation=selu`. Places, rule and where: as for `standard`.
    """
    return _drop_values(model, sample, "alpha", p, where, nn.AlphaDropout)


def spatial(model: nn.Module, *, sample: Tensor | None = None, p: float = 0.1) -> list[Change]:
    """Zeroes whole feature maps with probability p (Tompson et al. 2015), behind each convolution stage.

    Without places: the model's own Dropout2d modules get p; if it has none, one follows each activation module whose
    every signal is (N, C, H, W), next to a convolution, pooling or norm of channels, and larger than one pixel.
    """
    check("p", p, "[0, 1)")
    return _drop_maps(model, sample, "spatial", lambda: nn.Dropout2d(p))


def dropblock(model: nn.Module, *, sample: Tensor | None = None, p: float = 0.1, block_size: int = 3) -> list[Change]:
    """Zeroes squares of each feature map, a share p in all (Ghiasi et al. 2018), behind each convolution stage.

    Without places: as for `spatial`.

    block_size: pixels, odd; a smaller map has the largest that fits.
    """
    DropBlock(p, block_size)  # its complaint about a value comes before any about the model
    return _drop_maps(model, sample, "dropblock", lambda: DropBlock(p, block_size))


def stochastic_depth(model: nn.Module, *, sample: Tensor | None = None, p: float = 0.2) -> list[Change]:
    """Skips residual branch l of L with probability p l / L, image by image (Huang et al. 2016, sec. 3).

    Without places: the model's own StochasticDepth modules get p l / L, in the order in which they are registered; if
    it has none, torch.fx finds the additions of a branch to the signal that it started from. A branch is the side with
    more layers of weights, and ends with a module called there only; InputError names a block where that fails.
    """
    check("p", p, "[0, 1)")
    changes = _fill(model, ("residual",), lambda place: StochasticDepth(p * place.depth, "row"))
    if not changes and any(modules_of(model, ops.StochasticDepth)):
        changes = _set_depths(model, p)
    elif not changes and not any(modules_of(model, Place)):
        ends = _branch_ends(model)
        for i, path in enumerate(ends, start=1):
            changes += _wrap(model, model.get_submodule(path), None, StochasticDepth(p * i / len(ends), "row"))
    return required(changes, "dropout.stochastic_depth", "the model has no residual branch")


def _fill(model: nn.Module, kinds: Sequence[str], make: Callable[[Any], nn.Module]) -> list[Change]:
    return replace_each(model, (Place,), make, lambda place: place.kind in kinds)


def _wrap(model: nn.Module, old: nn.Module, before: nn.Module | None, behind: nn.Module | None) -> list[Change]:
    """Puts a module before or behind `old`, under every name that `old` has."""
    new = nn.Sequential(*(m for m in (before, old, behind) if m is not None))
    paths = [path for path, m in modules_of(model, type(old)) if m is old]
    for path in paths:
        replace(model, path, new.train(old.training))
    return [Change(path, describe(old), ", ".join(describe(m) for m in new)) for path in paths]


def _drop_values(
    model: nn.Module,
    sample: Tensor | None,
    name: str,
    p: float,
    where: Sequence[str],
    make: Callable[[float], nn.Module],
) -> list[Change]:
    check("p", p, "[0, 1)")
    if not where or not set(where) <= set(_WHERE):
        raise InputError(f"where must list some of {', '.join(_WHERE)}, got {list(where)}")
    changes = _fill(model, where, lambda place: make(p))
    if not changes:
        changes = replace_each(model, _VALUES, lambda old: make(p), lambda old: True)
    if not changes and not any(modules_of(model, Place)) and "head" in where:
        last = classifier_of(model, sample)
        changes = _wrap(model, last, make(p), None) if last else []
    return required(changes, f"dropout.{name}", f"the model has no place for it among {', '.join(where)}")


def _drop_maps(model: nn.Module, sample: Tensor | None, name: str, make: Callable[[], nn.Module]) -> list[Change]:
    changes = _fill(model, ("features",), lambda place: make())
    if not changes:
        changes = replace_each(model, _MAPS, lambda old: make(), lambda old: True)
    if not changes and not any(modules_of(model, Place)):
        for act in _map_activations(model, sample, name):
            changes += _wrap(model, act, None, make())
    return required(changes, f"dropout.{name}", "the model has no feature maps (N, C, H, W) that a module bends")


def _map_activations(model: nn.Module, sample: Tensor | None, name: str) -> list[nn.Module]:
    """The activations that only see maps of channels; (N, H, W, C) looks the same, so a neighbour must tell."""
    if sample is None:
        raise InputError(f"dropout.{name} needs a sample batch to find the feature maps of a model without places")
    seen = calls(model, sample)
    by_channels = [call for call in seen if isinstance(call.module, _CHANNELS_FIRST)]
    read = {id(call.input) for call in by_channels}
    made = {id(call.output) for call in by_channels}
    good: dict[nn.Module, bool] = {}
    for call in seen:
        if isinstance(call.module, (*ACTIVATIONS, *GATES)):
            shaped = call.output.dim() == 4 and call.output.shape[2:].numel() > 1
            told = id(call.output) in read or (id(call.input) in made and not isinstance(call.module, GATES))
            good[call.module] = good.get(call.module, True) and shaped and told
    return [act for act, always in good.items() if always]


class _Tracer(fx.Tracer):
    """Looks into every module that is made of others, and into no other."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(m.children()) or super().is_leaf_module(m, module_qualified_name)


def _set_depths(model: nn.Module, p: float) -> list[Change]:
    layers = list(dict.fromkeys(m for _, m in modules_of(model, ops.StochasticDepth)))
    rates = {m: p * i / len(layers) for i, m in enumerate(layers, start=1)}
    return replace_each(
        model, (ops.StochasticDepth,), lambda old: StochasticDepth(rates[old], old.mode), lambda old: True
    )


def _branch_ends(model: nn.Module) -> list[str]:
    """The path of the module that ends each residual branch, in the order of the forward."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # torch.fx raises whatever the model's own forward raises on a proxy
        raise InputError(
            f"dropout.stochastic_depth cannot find the residual branches, torch.fx cannot trace the model: {error}"
        ) from error
    times = Counter(node.target for node in graph.nodes if node.op == "call_module")
    ends = []
    for node in graph.nodes:
        branch = _branch(model, node) if _is_sum(node) else None
        if branch is None:
            continue
        if branch.op != "call_module" or len(branch.users) > 1 or times[branch.target] > 1:
            raise InputError(f"dropout.stochastic_depth: the branch that {node.name} adds does not end with one module")
        ends.append(str(branch.target))
    return ends


def _is_sum(node: fx.Node) -> bool:
    calls_add = node.op == "call_function" and node.target in (add, iadd, torch.add)
    method_add = node.op == "call_method" and node.target in ("add", "add_")
    return (calls_add or method_add) and len([a for a in node.args if isinstance(a, fx.Node)]) == 2


def _branch(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The side of a sum that is the residual branch; None where the two sides do not start from one signal."""
    a, b = (arg for arg in node.args if isinstance(arg, fx.Node))
    above_a, above_b = _above(a), _above(b)
    if not any(n.op != "get_attr" for n in above_a & above_b):
        return None
    depth_a, depth_b = (_layers(model, above - other) for above, other in ((above_a, above_b), (above_b, above_a)))
    if depth_a == depth_b == 0:
        return None
    if depth_a == depth_b:
        raise InputError(f"dropout.stochastic_depth: which side of {node.name} is the shortcut cannot be told")
    return a if depth_a > depth_b else b


def _above(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    seen, todo = set(), [node]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return seen


def _layers(model: nn.Module, nodes: set[fx.Node]) -> int:
    """How many of the nodes call a module with weight matrices."""
    called = [model.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"]
    return sum(any(p.dim() > 1 for p in m.parameters()) for m in called)

"""`dropout`: its kind, rate and place. `f(model, *, sample, p, **hp)` edits the model in place.

p is the share of what is dropped, in [0, 1); the rest is scaled so that the mean stays. All kinds are the identity in
eval mode, and bit for bit at p = 0. A knep model has places for each kind; in any other model each kind has the rule
that its function states. What low-rank adapters hold stays as their authors made it.

Each function lists its changes, and raises NoEffectError where the model has nothing that fits, and InputError for a p
outside [0, 1) or where the right place cannot be proved. sample: images (N, C, H, W), read by the rules for other
models.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from knep.errors import InputError
from knep.nn.dropout import DropBlock, StochasticDepth
from knep.nn.kinds import adapters
from knep.nn.place import Place
from knep.surgery.edit import Change, bare, describe, modules_of, replace_each, required
from knep.surgery.feature_maps import ChannelsLast, Map, maps_of
from knep.surgery.graph import refuse_scripted
from knep.surgery.insert_module import put_before, put_inside
from knep.surgery.record import Pass
from knep.surgery.residual import Residuals, drops_branches, end_with, follow, has_places, left_alone
from knep.surgery.sample import Inputs
from knep.utils.validation import check

__all__ = ["alpha", "dropblock", "none", "spatial", "standard", "stochastic_depth"]

_VALUES = (nn.Dropout, nn.AlphaDropout)
_MAPS = (nn.Dropout2d, DropBlock)
_WHERE = ("hidden", "head", "features")


def none(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Leaves the places empty and the model's own dropout alone."""
    return []


def standard(
    model: nn.Module, *, sample: Inputs | None = None, p: float = 0.5, where: Sequence[str] = ("hidden", "head")
) -> list[Change]:
    """Zeroes each value with probability p and divides the rest by 1 - p (Srivastava et al. 2014).

    Without places: the model's own Dropout modules get p; if it has none, one is put before the classifier.

    where: places to fill, of hidden (behind hidden linear layers), head (before the classifier) and features (behind
    convolution stages).
    """
    return _drop_values(model, sample, "standard", p, where, nn.Dropout)


def alpha(
    model: nn.Module, *, sample: Inputs | None = None, p: float = 0.1, where: Sequence[str] = ("hidden", "head")
) -> list[Change]:
    """Sets values to SELU's limit at minus infinity, then restores mean and variance (Klambauer et al. 2017).

    The dropout for `activation=selu`. Places, rule and where: as for `standard`.
    """
    return _drop_values(model, sample, "alpha", p, where, nn.AlphaDropout)


def spatial(model: nn.Module, *, sample: Inputs | None = None, p: float = 0.1) -> list[Change]:
    """Zeroes whole feature maps with probability p (Tompson et al. 2015), behind each convolution stage.

    Without places: the model's own Dropout2d modules get p; if it has none, one follows each activation module whose
    every signal is (N, C, H, W), next to a convolution, pooling or norm of channels, and larger than one pixel.
    """
    check("p", p, "[0, 1)")
    return _drop_maps(model, sample, "spatial", lambda: nn.Dropout2d(p))


def dropblock(model: nn.Module, *, sample: Inputs | None = None, p: float = 0.1, block_size: int = 3) -> list[Change]:
    """Zeroes squares of each feature map, a share p in all (Ghiasi et al. 2018), behind each convolution stage.

    Without places: as for `spatial`.

    block_size: pixels, odd; a smaller map has the largest that fits.
    """
    DropBlock(p, block_size)  # its complaint about a value comes before any about the model
    return _drop_maps(model, sample, "dropblock", lambda: DropBlock(p, block_size))


def stochastic_depth(model: nn.Module, *, sample: Inputs | None = None, p: float = 0.2) -> list[Change]:
    """Skips residual branch l of L with probability p l / L, image by image (Huang et al. 2016, sec. 3).

    Without places: the branches that `knep.surgery.residual` proves, in the order in which they are called; those that
    end with a stochastic depth of the model's own keep it, with the new rate. What cannot be read or told is listed,
    and InputError names it if nothing else is found. A branch that does not end with one layer is changed in the
    block's forward, in training only, after a comparison on the sample.
    """
    check("p", p, "[0, 1)")
    model = bare(model)
    changes = _fill(model, ("residual",), lambda place: StochasticDepth(p * place.depth, "row"))
    if not changes and not has_places(model):
        changes = _skip_branches(model, sample, p)
    return required(changes, "dropout.stochastic_depth", "the model has no residual branch")


def _skip_branches(model: nn.Module, sample: Inputs | None, p: float) -> list[Change]:
    refuse_scripted(model, "dropout.stochastic_depth")
    found = Residuals(model, sample)
    own = dict.fromkeys(m for _, m in modules_of(model, nn.Module) if drops_branches(m))
    places: list[tuple[int, Any]] = [(order, m) for m in own if (order := found.order_of(m)) is not None]
    places = sorted(places + [(branch.order, branch) for branch in found.branches], key=lambda place: place[0])
    if not places and found.left:
        path, reason = next(iter(found.left.items()))
        raise InputError(f"dropout.stochastic_depth: {path or 'the model'}: {reason}, use dropout=none or standard")
    changes = []
    for i, (_, place) in enumerate(places, start=1):
        new = StochasticDepth(p * i / len(places), getattr(place, "mode", "row"))
        if isinstance(place, nn.Module):
            changes += replace_each(
                model, (type(place),), lambda old, new=new: new, lambda old, place=place: old is place
            )
        else:
            changes.append(end_with(model, place, new, "stochastic_depth"))
    return changes + left_alone(model, found.left)


def _fill(model: nn.Module, kinds: Sequence[str], make: Callable[[Any], nn.Module]) -> list[Change]:
    return replace_each(model, (Place,), make, lambda place: place.kind in kinds)


def _drop_values(
    model: nn.Module,
    sample: Inputs | None,
    name: str,
    p: float,
    where: Sequence[str],
    make: Callable[[float], nn.Module],
) -> list[Change]:
    check("p", p, "[0, 1)")
    if not where or not set(where) <= set(_WHERE):
        raise InputError(f"where must list some of {', '.join(_WHERE)}, got {list(where)}")
    model = bare(model)
    changes = _fill(model, where, lambda place: make(p))
    if not changes:
        inside = adapters(model)
        changes = replace_each(model, _VALUES, lambda old: make(p), lambda old: old not in inside)
    if not changes and not has_places(model) and "head" in where:
        refuse_scripted(model, f"dropout.{name}")
        last = _classifier(model, sample)
        changes = [_before(model, last, make(p))] if last else []
    return required(changes, f"dropout.{name}", f"the model has no place for it among {', '.join(where)}")


def _classifier(model: nn.Module, sample: Inputs | None) -> nn.Module | None:
    """The linear layer or convolution that acts last when the model reads the sample; without, the last registered.

    Where a low-rank adapter stands around it, the adapter: what its branches read is changed for both.
    """
    acting = model.modules() if sample is None else (call.module for call in Pass(model, sample).seen)
    last = next((m for m in reversed(list(acting)) if isinstance(m, (nn.Linear, _ConvNd))), None)
    return None if last is None else _with_its_like(model, adapters(model).get(last, last))


def _with_its_like(model: nn.Module, last: nn.Module) -> nn.Module:
    """The module of heads that read one signal, where the last layer is one of several, else that layer itself.

    As a detector's classes and boxes: linear layers alone, of equally many inputs, and none as wide as what it reads.
    """
    for parent in model.modules():
        heads = list(parent.children())
        if last in heads and parent is not model and not isinstance(parent, (nn.Sequential, nn.ModuleList)):
            linear = [head for head in heads if isinstance(head, nn.Linear)]
            widths = {head.in_features for head in linear}
            if len(linear) == len(heads) > 1 and len(widths) == 1:
                return last if widths & {head.out_features for head in linear} else parent
    return last


def _before(model: nn.Module, module: nn.Module, new: nn.Module) -> Change:
    path = next(path for path, m in model.named_modules() if m is module)
    text = f"{describe(new)}, {describe(module)}"
    before = describe(module)
    put_before(module, new, "dropout")
    return Change(path, before, text)


def _drop_maps(model: nn.Module, sample: Inputs | None, name: str, make: Callable[[], nn.Module]) -> list[Change]:
    model = bare(model)
    changes = _fill(model, ("features",), lambda place: make())
    if not changes:
        changes = replace_each(model, _MAPS, lambda old: make(), lambda old: True)
    if not changes and not has_places(model):
        if sample is None:
            raise InputError(f"dropout.{name} needs a sample batch to find the feature maps of a model without places")
        refuse_scripted(model, f"dropout.{name}")
        changes = _behind_maps(model, *maps_of(model, sample), name, make)
    return required(changes, f"dropout.{name}", "the model has no feature maps (N, C, H, W) that an activation bends")


def _behind_maps(
    model: nn.Module, maps: list[Map], left: dict[str, str], name: str, make: Callable[[], nn.Module]
) -> list[Change]:
    if left and not maps:
        path, reason = next(iter(left.items()))
        raise InputError(f"dropout.{name}: {path or 'the model'}: {reason}, use dropout=none or standard")
    changes = []
    for place in maps:
        new = ChannelsLast(make()) if place.last else make()
        if place.graph is None or place.node is None:
            changes.append(follow(model, place.module, new, name))
            continue
        child = put_inside(place.module, new, name, place.graph, [(place.node, None)])
        path = f"{place.path}.{child}".lstrip(".")
        changes.append(Change(path, f"{type(place.module).__name__}: {place.node.name}", describe(new)))
    return changes + left_alone(model, left)

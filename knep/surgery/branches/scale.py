"""Factors at the ends of residual branches, in training and in eval mode."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from knep.errors import InputError, NoEffectError
from knep.nn.branch import BranchScale
from knep.surgery.edit import Change, unfuse
from knep.surgery.graph import refuse_scripted
from knep.surgery.record import hooked, mode
from knep.surgery.residual import Branch, Residuals, end_with, left_alone
from knep.surgery.sample import Inputs, call, ready

_NO_BRANCH = "the model has no residual branch"
_WIDTHS = ("out_channels", "out_features", "embed_dim", "nf")  # of convolutions, linear layers, attention, Conv1D
_OTHER_IN_EVAL = "torch.fx reads another forward in eval mode, in which a factor acts as well"


def branches_of(model: nn.Module, sample: Inputs | None, name: str) -> tuple[list[Branch], list[Change]]:
    """All residual branches to whose ends a factor can be put, in the order of their calls, and what is left.

    Raises NoEffectError for a model that has none, InputError, with the reason, where one cannot be read.
    """
    refuse_scripted(model, name)
    found = Residuals(model, sample, scaled=True)
    kept = [b for b in found.branches if b.end is not None or b.evaluated is not None]
    found.left |= {b.path: _OTHER_IN_EVAL for b in found.branches if b not in kept}
    if not kept and found.left:
        path, reason = next(iter(found.left.items()))
        raise InputError(f"{name}: {path or 'the model'}: {reason}, use init=default or he_normal")
    if not kept:
        raise NoEffectError(f"{name} changed nothing: {_NO_BRANCH}")
    return sorted(kept, key=lambda branch: branch.order), left_alone(model, found.left)


def scale_ends(
    model: nn.Module,
    sample: Inputs | None,
    branches: list[Branch],
    name: str,
    make: Callable[[Branch], BranchScale],
) -> list[Change]:
    """Puts what `make` gives behind each branch. Raises InputError where the model then is another at a scale of 1."""
    before, like = _outputs(model, sample), next(model.parameters())
    put = []
    for branch in branches:
        new = make(branch).to(like)
        end_with(model, branch, new, name)
        unfuse(branch.owner)
        put.append(new)
    _refuse_another(model, sample, put, before, name)
    paths = {id(m): path for path, m in model.named_modules()}
    return [Change(f"{paths[id(m)]}.scale", "a branch without a factor", f"{name}, {_value(m)}") for m in put]


def _value(scale: BranchScale) -> str:
    text = "unknown" if scale.scale.is_meta else f"{scale.scale.detach()[0].item():.4g}"
    return text if len(scale.scale) == 1 else f"{text} for each of {len(scale.scale)} channels"


def _outputs(model: nn.Module, sample: Inputs | None) -> list[Tensor]:
    if sample is None:
        return []
    with torch.no_grad(), torch.random.fork_rng(devices=[]), mode(model, False):
        leaves = pytree.tree_leaves(call(model, ready(model, sample)))
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _refuse_another(
    model: nn.Module, sample: Inputs | None, put: list[BranchScale], before: list[Tensor], name: str
) -> None:
    values = [m.scale.detach().clone() for m in put]
    with torch.no_grad():
        for m in put:
            m.scale.fill_(1)
        after = _outputs(model, sample)
        for m, value in zip(put, values, strict=True):
            m.scale.copy_(value)
    same = [a.is_meta or torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
            for a, b in zip(after, before, strict=True)]  # fmt: skip
    if not all(same):
        raise InputError(f"{name}: the model computes something else once its branches have factors: use init=default")


def channels_of(
    model: nn.Module, sample: Inputs | None, branches: list[Branch], name: str
) -> dict[int, tuple[int, int]]:
    """(channels, axis) of the signal at the end of each branch, by its place in the list; axis 1 or -1.

    The last layer with weights before it says how many there are, and whether they lie on the last axis (linear) or on
    axis 1 (convolutions); where that axis has another size, the other one is meant.
    """
    if sample is None:
        raise InputError(f"{name} looks at the signals in the branches: give sample")
    watch = {b.end: i for i, b in enumerate(branches) if b.end is not None}
    inside = {b.owner for b in branches if b.end is None}
    shapes: dict[nn.Module, torch.Size] = {}
    last: dict[nn.Module, nn.Module] = {}
    weighty: list[nn.Module] = []

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(module, (nn.Linear, _ConvNd, nn.MultiheadAttention)) or type(module).__name__ == "Conv1D":
            weighty.append(module)
        if module in watch or module in inside:
            shapes[module] = output.shape if isinstance(output, Tensor) else torch.Size()
            last[module] = weighty[-1] if weighty else module

    with torch.no_grad(), mode(model, False), hooked(list(model.modules()), leave=note):
        call(model, ready(model, sample))
    found = {}
    for i, branch in enumerate(branches):
        key = branch.owner if branch.end is None else branch.end
        found[i] = _axis(branch.path, shapes.get(key, torch.Size()), last.get(key, key), name)
    return found


def _axis(path: str, shape: torch.Size, layer: nn.Module, name: str) -> tuple[int, int]:
    count = next((n for key in _WIDTHS if (n := getattr(layer, key, None))), None)
    sizes = {1: shape[1], -1: shape[-1]} if len(shape) > 1 else {}
    for axis in (1, -1) if isinstance(layer, _ConvNd) else (-1, 1):
        if count is not None and sizes.get(axis) == count:
            return count, -1 if len(shape) == 2 else axis
    raise InputError(f"{name}: {path}: which axis of {tuple(shape)} has the channels cannot be told: use init=skipinit")


def own_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> each layer scale that the model has: of a LayerScale module, or a parameter of that name."""
    found = {}
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if p.requires_grad and ("layer_scale" in name.rpartition(".")[2] or "LayerScale" in type(owner).__name__):
            found[name] = p
    return found

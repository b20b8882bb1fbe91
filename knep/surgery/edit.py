"""Editing modules in place: what every model slot (norm, activation, dropout, init) is made of."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from knep.errors import InputError, NoEffectError

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# What holds a model and nothing of its own: class -> the attribute that is the model.
_WRAPPERS = dict.fromkeys(("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"), "module") | {
    "_FabricModule": "_forward_module"
}


@dataclass(frozen=True)
class Change:
    """One edit of a model: the dotted path of the layer or parameter, and what stood there before and after."""

    path: str
    before: str
    after: str


def cut(model: nn.Module) -> dict[int, Any]:
    """The memo with which `copy.deepcopy` copies a model that holds computed tensors, which it refuses: cut from their
    graph. A forward pass leaves such in attributes, as torch.nn.utils.weight_norm does, alone or in lists and dicts.
    """
    computed = (t for m in model.modules() for t in _tensors(vars(m)) if t.grad_fn is not None)
    return {id(t): t.detach().clone() for t in computed}


def _tensors(value: object, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part, depth - 1)


def bare(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s wrapper, or the model itself: what a slot may edit.

    Raises InputError, naming the module, for DataParallel and DistributedDataParallel, which took hold of the
    parameters when they were built, and for lazy modules, whose shapes are not known before the first forward.
    """
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # pyright: ignore[reportAssignmentType]
    for path, module in model.named_modules():
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            where = f" at {path}" if path else ""
            raise InputError(
                f"the model is wrapped by {type(module).__name__}{where}: apply the recipe before wrapping"
            )
    _refuse_lazy(model)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all wrappers for several devices, for compiling and for Fabric: whose parameters are trained.

    Raises InputError for lazy modules, as `bare` does.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    _refuse_lazy(model)
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    names = ("_orig_mod", *(_WRAPPERS[c.__name__] for c in type(model).__mro__ if c.__name__ in _WRAPPERS))
    return next((m for name in names if isinstance(m := getattr(model, name, None), nn.Module)), None)


def _refuse_lazy(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            name = f"{path or 'the model'} ({type(module).__name__})"
            raise InputError(f"{name} has no shape yet: run one batch through the model first")


def frozen_parts(model: nn.Module) -> Callable[[str], bool]:
    """Whether a path belongs to a part that is not trained: the nearest module around it that has parameters.

    Where nothing is trained at all, freezing does not tell parts apart, and no path does.
    """
    flags = {p.requires_grad for p in model.parameters()}

    def is_frozen(path: str) -> bool:
        while path:
            own = [p.requires_grad for p in model.get_submodule(path).parameters()]
            if own:
                return not any(own)
            path = path.rpartition(".")[0]
        return False

    return is_frozen if flags == {True, False} else lambda path: False


def describe(module: nn.Module) -> str:
    """The module's class and arguments on one line."""
    return f"{type(module).__name__}({module.extra_repr()})"


def text(module: nn.Module) -> str:
    """One line for a module, or for those of a short sequence."""
    return ", ".join(map(describe, module)) if isinstance(module, nn.Sequential) else describe(module)


def refuse_hooks(path: str, module: nn.Module, slot: str) -> None:
    """InputError where a module carries hooks, which whatever takes its place would lose."""
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        name = f"{path} ({type(module).__name__})"
        raise InputError(f"{name} has hooks, which a new layer would lose: remove them first, or use {slot}=none")


def unfuse(module: nn.Module) -> None:
    """Switches torch's fused path off, which in eval mode computes a transformer layer's own norm and activation."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where `path` points, on the device, in the dtype and mode of what stood there."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    old = getattr(owner, name)
    new.train(old.training)
    like = next(iter(old.parameters()), None)
    if like is None:
        like = next(iter(model.parameters()), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    setattr(owner, name, new)


def modules_of(model: nn.Module, *types: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """(path, module) of every submodule of these types, every path of a shared module included, in module order."""
    found = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if path and isinstance(m, types)]
    yield from found


def replace_each(
    model: nn.Module, types: tuple[type[nn.Module], ...], make: Callable[[Any], nn.Module], where: Callable[[Any], bool]
) -> list[Change]:
    """Replace every module of `types` that `where` accepts by `make(module)`; one new module per shared old one."""
    done: dict[int, nn.Module] = {}
    changes = []
    for path, old in modules_of(model, *types):
        if not where(old):
            continue
        new = done[id(old)] if id(old) in done else done.setdefault(id(old), make(old))
        changes.append(Change(path, describe(old), describe(new)))
        replace(model, path, new)
    return changes


def required(changes: list[Change], slot: str, reason: str) -> list[Change]:
    """The changes, or NoEffectError with the reason where there are none."""
    if not changes:
        raise NoEffectError(f"{slot} changed nothing: {reason}")
    return changes


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing. Raises InputError for a model that holds what cannot be copied."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"the model cannot be copied: use apply(model), which edits it in place ({text})") from error

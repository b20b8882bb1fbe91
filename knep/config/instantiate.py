"""Instantiating config nodes, from allowed targets only.

A config may come from a checkpoint, a run folder or a search path, so what it can name is what it can run. Allowed from
the start is what builds tricks, models and data: see `_ROOMS`. Whatever a user names beyond it, by `allow` or on the
command line, is allowed too; a config cannot allow anything itself.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import is_dataclass
from inspect import isclass, isfunction, isroutine
from types import ModuleType
from typing import Any, get_type_hints

from knep.config.budget import bytes_counted, lift
from knep.config.budget import take as take_budget
from knep.config.moved import with_current_names
from knep.errors import InputError
from knep.utils.imports import see_current_folder

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_SWITCHES = ("_partial_", "_recursive_")
_CONVERT = ("none", "partial", "object", "all")
_LISTS = (list, tuple)
_MOST, _DEEPEST = 10_000, 30
_RESOLVER = re.compile(r"\$\{[^}]*(:|\$\{)")

# What users have allowed: packages ("mypkg.") and whole names ("mypkg.nets.build").
_allowed: list[str] = []


def _of(base: str) -> Callable[[Any], bool]:
    """Whether an object is a class under `base`, which is imported when it is first asked for."""
    return lambda found: isclass(found) and issubclass(found, _locate(base))


def _makes_module(found: object) -> bool:
    from torch import nn

    made = get_type_hints(found).get("return") if isfunction(found) else found
    return isclass(made) and issubclass(made, nn.Module)


def _makes_steps(found: object) -> bool:
    return _of("torch.optim.Optimizer")(found) or _of("torch.optim.lr_scheduler.LRScheduler")(found)


def _is_trick(found: Any) -> bool:
    return found.__qualname__ in getattr(importlib.import_module(found.__module__), "__all__", ())


# Package -> what a config may take from it, in words and as a test.
_ROOMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "knep.data.": ("data modules", _of("knep.data.base.ImageData")),
    "knep.doctor.": ("callbacks", _of("knep.doctor.live.callback.Doctor")),
    "knep.guard.": ("guards", _of("knep.guard.policy.Guard")),
    "knep.models.": ("models", _makes_module),
    "knep.recipes.": ("tricks", _is_trick),
    "knep.tasks.": ("tasks", _of("knep.tasks.base.Common")),
    "lightning.pytorch.": ("the Trainer", _of("lightning.pytorch.Trainer")),
    "pytorch_optimizer.": ("optimizers and schedulers", _makes_steps),
    "torch.nn.": ("modules", _of("torch.nn.Module")),
    "torch.optim.": ("optimizers and schedulers", _makes_steps),
}


def allow(name: str) -> None:
    """Lets configs build what is defined in a package ("mypkg."), or one class or function ("mypkg.nets.build").

    Raises InputError for a name that is no dotted path.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name.removesuffix(".")):
        raise InputError(f'{name!r} cannot be allowed: write a package with a dot, "mypkg.", or "mypkg.nets.build"')
    if name not in _allowed:
        _allowed.append(name)


def allowed() -> tuple[str, ...]:
    """What users have allowed."""
    return tuple(_allowed)


def allow_typed(overrides: Sequence[str]) -> None:
    """Allows what a user types: `allow_targets=[mypkg.]`, and each class or function named outright.

    overrides: the lines of the command line alone; none that a run folder or a config file holds.
    """
    from knep.config.overrides import parse

    parsed = parse(overrides)
    loaders = any(o.key_or_group == "data" and "import" in str(o.value()) for o in parsed if not o.is_delete())
    for override in parsed:
        key, value = override.key_or_group, None if override.is_delete() else override.value()
        if key == "budget":
            raise InputError(
                "budget is a group of limits: write each by its name, for example budget.layers=50000; what a search "
                "may spend is budget=10m beside recipe=auto"
            )
        if key.startswith("budget."):
            lift(key.removeprefix("budget."), value)
        elif key == "allow_targets":
            for name in value if isinstance(value, list) else [value]:
                allow(str(name))
        elif key.endswith("._target_") or key == "model.path" or (key == "data.path" and loaders):
            # Of a sweep, each of its values was typed.
            for name in getattr(value, "list", [value]):
                _allow_named(key, getattr(name, "text", name))


def _allow_named(key: str, name: object) -> None:
    if not isinstance(name, str):
        return
    try:
        allow(name.replace(":", "."))
    except InputError as error:
        raise InputError(f"{key}={name} is no name: write one such as mypkg.nets.build") from error


def take_allowed(config: dict[str, Any]) -> None:
    """Takes `allow_targets` and `budget` out of a composed config. Raises InputError for what nobody typed of them."""
    take_budget(config)
    untyped = [name for name in config.pop("allow_targets", None) or () if name not in _allowed]
    if untyped:
        raise InputError(
            f"allow_targets={untyped[0]} comes from a file, which cannot allow itself anything: "
            f"if you trust it, write allow_targets=[{untyped[0]}] on the command line"
        )


def check_stored(lines: Sequence[str], place: str) -> None:
    """Refuses, in the override lines of a run folder, what does more than set values of the task.

    Raises InputError for an option of the command, a key of Hydra's own, or a resolver such as ${oc.env:HOME}.
    """
    from knep.config.overrides import parse

    for line in lines:
        option = line.strip().startswith("-")
        try:
            refused = option or _RESOLVER.search(line) or any(_reaches_out(o) for o in parse([line]))
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        if refused:
            raise InputError(f"{place} holds {line!r}, which is not taken from a file: remove it, or type it yourself")


def _reaches_out(override: Any) -> bool:
    """Whether an override says where Hydra writes."""
    return override.key_or_group.startswith("hydra")


def only_read(lines: Sequence[str], typed: Sequence[str]) -> list[str]:
    """The override lines of a run folder, which let a cache of images be read where they say, and none be written.

    Limits that they lift are left out: whoever goes on with the run says so again where it matters.

    lines: checked by `check_stored`; typed: what the user writes beside them, who may name a folder to write to.
    """
    from knep.config.overrides import parse

    lines = [line for line in lines if not line.strip().lstrip("+").startswith("budget.")]  # typed each time anew
    if any(line.lstrip("+").startswith("data.cache=") for line in typed):
        return [line for line in lines if not line.lstrip("+").startswith("data.write_cache=")]
    named = any(o.key_or_group == "data.cache" and isinstance(o.value(), str) for o in parse(lines))
    return [*lines, "data.write_cache=false"] if named else list(lines)


def check_targets(node: object, path: str = "") -> None:
    """Raises InputError naming the first `_target_` in `node` that is not allowed, or what could hide one.

    node: plain data, as `OmegaConf.to_container(cfg, resolve=True)` gives it; path: where in the config it stands.
    """
    _check_end(node, path)
    _check_targets(node, path)


def _check_end(node: object, path: str) -> None:
    """Refuses what is no config by its size: Hydra would copy it value by value, or go round in it for ever."""
    branches, seen = [(node, 0)], 0
    while branches:
        branch, depth = branches.pop()
        held = list(branch.values() if isinstance(branch, Mapping) else branch if isinstance(branch, _LISTS) else ())
        seen += len(held)
        if seen > _MOST or depth > _DEEPEST:
            raise InputError(f"{path or 'config'} has more than {_MOST:,} values or {_DEEPEST} levels: no config has")
        branches += [(value, depth + 1) for value in held]


def _check_targets(node: object, path: str) -> None:
    if isinstance(node, Mapping):
        if "_target_" in node:
            _check_target(node, path or "config")
        for key, value in node.items():
            _check_targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, _LISTS):
        for i, value in enumerate(node):
            _check_targets(value, f"{path}[{i}]")
    elif isinstance(node, str) and "${" in node:
        raise InputError(f"{path}={node} is not resolved: write its value")
    elif is_dataclass(node) or hasattr(node, "__attrs_attrs__"):
        raise InputError(f"{path} is a {type(node).__name__}, which Hydra reads as config: write plain data")


def instantiate(node: Mapping[str, Any], *args: object, **kwargs: Any) -> Any:
    """`hydra.utils.instantiate` for allowed targets; the error of a constructor is raised as it was."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    plain = with_current_names(_plain(node))
    check_targets(plain)
    try:
        with nullcontext() if _is_own(plain) else bytes_counted():
            return hydra_instantiate(plain, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            where = plain.get("_target_", "config")
            raise InputError(f"{where}: {cause}" if str(cause).startswith("it ") else str(cause)) from None
        if isinstance(cause, (ValueError, TypeError)):
            # torch's own have a stack of C++ below their first line
            raise (cause if "\n" not in str(cause) else InputError(str(cause).split("\n")[0])) from None
        text = " ".join(str(error).split()).partition(", set env var HYDRA_FULL_ERROR")[0]
        raise InputError(text) from error


def _is_own(node: object) -> bool:
    """Whether users named all that a node builds: classes of their own make what they make."""
    if isinstance(node, Mapping):
        name = node.get("_target_")
        return (name is None or name in _allowed or bool(_in(name, _allowed))) and all(map(_is_own, node.values()))
    return all(map(_is_own, node)) if isinstance(node, _LISTS) else True


def _plain(node: object) -> Any:
    """`node` with dicts and lists for OmegaConf's, resolved once: what is checked is what is built."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node, resolve=True)
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, (list, tuple)) else node


def _check_target(node: Mapping[str, Any], path: str) -> None:
    target = node["_target_"]
    if not isinstance(target, str):
        raise InputError(f"{path}._target_={target!r} is not text: write a name such as torch.optim.SGD")
    for key in _SWITCHES:
        if not isinstance(node.get(key, True), bool):
            raise InputError(f"{path}.{key}={node[key]!r}: write true or false")
    if node.get("_convert_", "all") not in _CONVERT:
        raise InputError(f"{path}._convert_={node['_convert_']!r}: write one of {', '.join(_CONVERT)}")
    real = _check_name(target, f"{path}._target_", built_in=True)
    # Arguments by place could be the path of a model, which is a target too.
    if "_args_" in node and _in(real, list(_ROOMS)):
        raise InputError(f"{path}._args_: write the arguments of {target} by name")
    if real.startswith(("knep.models.", "knep.data.own.imported.")) and node.get("path") not in (None, "???"):
        _check_name(str(node["path"]).replace(":", "."), f"{path}.path", built_in=False)


def _in(name: str, prefixes: Sequence[str]) -> str | None:
    return next((p for p in prefixes if p.endswith(".") and name.startswith(p)), None)


def _check_name(name: str, place: str, built_in: bool) -> str:
    """The name under which the object of a name is defined.

    InputError unless the user named it outright, or it is defined in an allowed package and of its kind.
    """
    if name in _allowed or (_NAME.fullmatch(name) and _in(name, _allowed)):
        see_current_folder(name, place)
    if name in _allowed:
        return name
    rooms = list(_ROOMS) if built_in else []
    if not _NAME.fullmatch(name) or "__" in name:
        raise InputError(f"{place}={name} is no name that a config may use: write one such as torch.optim.SGD")
    if not _in(name, [*_allowed, *rooms]):
        raise InputError(f"{place}={name} is not allowed: {_remedy(name)}")
    found = _locate(name, place)
    if not (isclass(found) or isroutine(found)) or not isinstance(found.__module__, str):
        raise InputError(f"{place}={name} is a {type(found).__name__}: write the name of a class or function")
    real = f"{found.__module__}.{found.__qualname__}"
    if _in(real, _allowed):
        return real
    room = _in(real, rooms)
    if room is None:
        raise InputError(f"{place}={name} is {real}, which is not allowed: {_remedy(real)}")
    kind, fits = _ROOMS[room]
    if not fits(found):
        raise InputError(f"{place}={name} is not allowed, {room[:-1]} gives configs {kind} only: {_remedy(name)}")
    return real


def _remedy(name: str) -> str:
    package = name.rpartition(".")[0]
    wanted = f"{package}." if package else name
    line = f"allow_targets=[{wanted}] on the command line (knep evaluate, predict and export: --allow {wanted})"
    return f'if you trust it, call knep.allow("{wanted}") or write {line}'


def _locate(name: str, place: str = "config") -> Any:
    """The object of a dotted name. The way leads through modules, each under its own name, and then through classes.

    Raises InputError where it leads elsewhere, such as through a module that another one imports.
    """
    first, *rest = name.split(".")
    found, path = _import(first, name, place), first
    for part in rest:
        path = f"{path}.{part}"
        if isinstance(found, ModuleType) and not hasattr(found, part):
            _import(path, name, place)
        if not hasattr(found, part):
            raise InputError(f"{place}={name}: {path} does not exist")
        found = getattr(found, part)
        if isinstance(found, ModuleType) and found.__name__ != path:
            raise InputError(f"{place}={name} leads through {found.__name__}, which is not allowed: {_remedy(name)}")
    return found


def _import(module: str, name: str, place: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{place}={name}: {module} cannot be imported ({error})") from error

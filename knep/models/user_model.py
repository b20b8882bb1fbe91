"""A model of somebody else's project, by the path of the function or class that builds it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knep.errors import InputError
from knep.surgery.check_forward import probe
from knep.utils.imports import see_current_folder


def find(path: str | None, key: str = "model.path") -> Callable[..., Any]:
    """What "package.module:name" or "package.module.name" names, a function or class; the current folder is seen too.

    key: what the error calls the path. Raises InputError naming the module, the attribute and what was found there.
    """
    if not path or not isinstance(path, str):
        raise InputError(f"{key} is missing: write {key}=mypkg.nets:build, the path of what builds the model")
    module_name, _, names = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not names:
        raise InputError(f"{key}={path} names no module and builder: write {key}=mypkg.nets:build")
    found = reduce(
        lambda owner, name: _member(owner, name, f"{key}={path}"), names.split("."), _module(module_name, key)
    )
    if isinstance(found, nn.Module):
        raise InputError(f"{key}={path} is a {type(found).__name__} that is built already: name what builds it")
    if not callable(found):
        raise InputError(
            f"{key}={path}: {names} of module {module_name} is a {type(found).__name__}, which is not callable: "
            "name a function or class that builds an nn.Module"
        )
    return found


def _module(name: str, key: str) -> Any:
    see_current_folder(name, key)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"{key}: importing {name} failed, because module {error.name} is missing") from error
        raise InputError(
            f"{key}: there is no module {error.name}, neither installed nor in {Path.cwd()}: check the spelling, or "
            "run from the folder that holds it"
        ) from error
    except Exception as error:  # a module of another project may raise anything while it is imported
        text = " ".join(str(error).split())
        raise InputError(f"{key}: importing {name} failed: {type(error).__name__}: {text}") from error


def _member(owner: Any, name: str, where: str) -> Any:
    if hasattr(owner, name):
        return getattr(owner, name)
    near = get_close_matches(name, [n for n in vars(owner) if not n.startswith("_")], n=1)
    kind = "module" if inspect.ismodule(owner) else "class"
    hint = f"did you mean {near[0]}?" if near else "name a function or class that builds an nn.Module"
    raise InputError(f"{where}: {kind} {owner.__name__} has no attribute {name}: {hint}")


def accepted(builder: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered keywords that the builder's signature names; `num_classes` also where it takes any."""
    try:
        parameters = inspect.signature(builder).parameters
    except ValueError:  # built-in callables need not have a signature
        return {}
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {k: v for k, v in offered.items() if k in parameters or (any_keyword and k == "num_classes")}


def build(path: str | None, offered: Mapping[str, Any], key: str = "model.path") -> nn.Module:
    """The model that `path` builds from those of the offered keywords that it takes.

    Raises InputError for a path that leads nowhere, a builder that fails or needs more, or what is no nn.Module.
    """
    builder = find(path, key)
    given = accepted(builder, offered)
    call = f"{path}({', '.join(f'{k}={v}' for k, v in given.items())})"
    try:
        model = builder(**given)
    except Exception as error:  # a builder of another project may raise anything
        text = " ".join(str(error).split())
        raise InputError(f"{key}: {call} failed: {type(error).__name__}: {text}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{key}: {call} gave a {type(model).__name__}, not an nn.Module")
    return model


def imported(
    in_channels: int, num_classes: int, image_size: int | tuple[int, int], *, path: str | None = None
) -> nn.Module:
    """Images (N, in_channels, H, W) to class scores (N, num_classes) by a model of your own; image_size: H = W or both.

    path: "package.module:name" of a function or class; it gets those of num_classes, in_channels and image_size that
    its signature takes. Raises InputError as `build` does, and for a model that cannot read such images or whose scores
    have another shape.
    """
    model = build(path, {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size})
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    scores = probe(model, torch.zeros(2, in_channels, height, width))
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if shape != (2, num_classes):
        raise InputError(
            f"model.path={path} gives {shape} for 2 images where (2, {num_classes}) is needed, a score for each class: "
            "let the builder take num_classes"
        )
    return model

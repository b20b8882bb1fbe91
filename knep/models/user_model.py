"""A model of somebody else's project, by the path of the function or class that builds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knep.errors import InputError
from knep.surgery.check_forward import probe
from knep.utils import imports


def find(path: str | None, key: str = "model.path") -> Callable[..., Any]:
    """What "package.module:name" or "package.module.name" names, a function or class; the current folder is seen too.

    key: what the error calls the path. Raises InputError naming the module, the attribute and what was found there.
    """
    found = imports.find(path, key)
    if isinstance(found, nn.Module):
        raise InputError(f"{key}={path} is a {type(found).__name__} that is built already: name what builds it")
    if not callable(found):
        module_name, _, names = str(path).partition(":") if ":" in str(path) else str(path).rpartition(".")
        raise InputError(
            f"{key}={path}: {names} of module {module_name} is a {type(found).__name__}, which is not callable: "
            "name a function or class that builds an nn.Module"
        )
    return found


def accepted(builder: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered keywords that the builder's signature names; `num_classes` also where it takes any."""
    try:
        parameters = inspect.signature(builder).parameters
    except ValueError:  # built-in callables need not have a signature
        return {}
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {k: v for k, v in offered.items() if k in parameters or (any_keyword and k == "num_classes")}


def build(
    path: str | None, offered: Mapping[str, Any], key: str = "model.path", args: Mapping[str, Any] | None = None
) -> nn.Module:
    """The model that `path` builds from those of the offered keywords that it takes, and from args.

    Raises InputError for a path that leads nowhere, a builder that fails or needs more, or what is no nn.Module.
    """
    builder = find(path, key)
    given = accepted(builder, offered) | dict(args or {})
    call = f"{path}({', '.join(f'{k}={v}' for k, v in given.items())})"
    try:
        model = builder(**given)
    except Exception as error:  # a builder of another project may raise anything
        text = " ".join(str(error).split())
        raise InputError(f"{key}: {call} failed: {type(error).__name__}: {text}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{key}: {call} gave a {type(model).__name__}, not an nn.Module")
    return model


def _reads_images(model: nn.Module) -> bool:
    """Not so a model that looks its input up by whole numbers."""
    return not any(isinstance(m, nn.Embedding) for m in model.modules())


def imported(
    in_channels: int,
    num_classes: int,
    image_size: int | tuple[int, int],
    *,
    path: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Images (N, in_channels, H, W) to class scores (N, num_classes) by a model of your own; image_size: H = W or both.

    Or what another task than classes of images has: see `knep.config.schema.DataSpec` for what the three numbers say.

    path: "package.module:name" of a function or class; it gets those of num_classes, in_channels and image_size that
    its signature takes. args: further keywords for it. Raises InputError as `build` does, and for a model that cannot
    read such images or whose scores have another shape.
    """
    model = build(
        path, {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}, args=args or {}
    )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 2 or not _reads_images(model):
        return model  # rows are no images: what it gives is looked at with the first batch
    scores = probe(model, torch.zeros(2, in_channels, height, width))
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if shape not in ((2, num_classes), (2, num_classes, height, width)):
        raise InputError(
            f"model.path={path} gives {shape} for 2 images where (2, {num_classes}) is needed, a score for each class: "
            "let the builder take num_classes"
        )
    return model

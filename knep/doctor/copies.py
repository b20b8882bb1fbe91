"""Copies of other projects' models: out of their wrappers, and where deepcopy refuses, as tensors kept for Grad-CAM."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from knep.errors import InputError


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; what a forward pass left in attributes, alone or in lists and dicts, is cut from its graph.

    Raises InputError for a model that cannot be copied, as one that holds an open file.
    """
    kept = (t for m in model.modules() for t in _tensors(vars(m)) if t.grad_fn is not None)
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept})
    except Exception as error:  # attributes of another's model may be anything
        raise InputError(
            f"the model cannot be copied: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def unwrapped(model: Any) -> nn.Module:
    """The module itself of one that is compiled or spread over devices."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part, depth - 1)

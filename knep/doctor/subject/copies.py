"""Copies of other projects' models: out of their wrappers, and where deepcopy refuses, as tensors kept for Grad-CAM."""

from __future__ import annotations

import copy

from torch import nn

from knep.errors import InputError
from knep.surgery.edit import cut


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; what a forward pass left in attributes, alone or in lists and dicts, is cut from its graph.

    Raises InputError for a model that cannot be copied, as one that holds an open file.
    """
    try:
        return copy.deepcopy(model, cut(model))
    except Exception as error:  # attributes of another's model may be anything
        raise InputError(
            f"the model cannot be copied: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself of one that is compiled or spread over devices."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model

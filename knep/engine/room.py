"""Whether there is room for what a config or file asks for, before memory is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from knep.config.budget import layers_counted, machine_memory
from knep.config.instantiate import instantiate
from knep.errors import InputError

_LARGEST = 10**7  # width or number of layers


def check_room(size: int, what: str, remedy: str) -> None:
    """Raises InputError where `size` bytes are more than the machine's memory; what: "the model's weights need"."""
    memory = machine_memory()
    if size > memory:
        raise InputError(f"{what} {size / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f} GB: {remedy}")


def check_model(node: Mapping[str, Any], shape: Mapping[str, int], most: int | None = None, members: int = 1) -> None:
    """Counts the parameters of one of knep's own models without memory for them, on torch's meta device.

    shape: in_channels, num_classes and image_size; most: how many there may be, None for what the machine can train;
    members: models of this kind that are trained at once.
    Raises InputError for a model that is too large. Models of other projects are as large as their builders make them.
    """
    target = str(node["_target_"])
    if not target.startswith("knep.models.") or "imported" in target:
        return
    for key, value in node.items():
        if isinstance(value, int) and value > _LARGEST:
            raise InputError(f"model.{key}={value} is no size of a layer: write at most {_LARGEST:,}")
    try:
        with torch.device("meta"), layers_counted("the model"):
            count = sum(p.numel() for p in instantiate(node)(**shape).parameters())
    except RuntimeError as error:  # a size that overflows
        raise InputError(f"a layer is too large ({str(error).splitlines()[0][:80]}): write smaller numbers") from error
    except TypeError as error:  # a keyword that it lacks, or a value of another kind
        raise InputError(f"{target} cannot be built ({str(error)[:120]}): change the values of model") from error
    if most is not None and count > most:
        raise InputError(f"its config builds {count:,} parameters, and it holds {most:,}")
    check_room(8 * count * members, "the model's weights and gradients need", "write smaller widths")

"""Whether there is room for what a config or file asks for, before memory is taken."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from knep.errors import InputError
from knep.safe import instantiate


def check_room(size: int, what: str, remedy: str) -> None:
    """Raises InputError where `size` bytes are more than the machine's memory; what: "the model's weights need"."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise InputError(f"{what} {size / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f} GB: {remedy}")


def check_model(node: Mapping[str, Any], shape: Mapping[str, int], most: int | None = None) -> None:
    """Counts the parameters of one of knep's own models without memory for them, on torch's meta device.

    shape: in_channels, num_classes and image_size; most: how many there may be, None for what the machine can train.
    Raises InputError for a model that is too large. Models of other projects are as large as their builders make them.
    """
    target = str(node["_target_"])
    if not target.startswith("knep.models.") or "imported" in target:
        return
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in instantiate(node)(**shape).parameters())
    except RuntimeError as error:  # a size that overflows
        raise InputError(f"a layer is too large ({str(error).splitlines()[0][:80]}): write smaller numbers") from error
    except TypeError as error:  # a keyword that it lacks, or a value of another kind
        raise InputError(f"{target} cannot be built ({str(error)[:120]}): change the values of model") from error
    if most is not None and count > most:
        raise InputError(f"its config builds {count:,} parameters, and it holds {most:,}")
    check_room(8 * count, "the model's weights and gradients need", "write smaller widths")

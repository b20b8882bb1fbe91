"""timm's image classifiers by name, untrained: more nets that a trick was not written for (Wightman 2019)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from knep.errors import InputError
from knep.surgery.check_forward import probe

_OF_DATA = ("num_classes", "in_chans", "img_size", "pretrained", "checkpoint_path", "pretrained_cfg")


def timm(
    in_channels: int,
    num_classes: int,
    image_size: int,
    *,
    name: str = "resnet18",
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Images (N, in_channels, image_size, image_size) to class scores (N, num_classes) by one of timm's classifiers.

    Nothing is downloaded. Norms, activations and dropouts are exchanged where they stand.

    name: as in timm.list_models(); args: further keywords of its builder, such as {drop_path_rate: 0.1}.
    Raises InputError where timm is not installed, for an unknown name, with the nearest, for keywords that the data
    give or that fetch weights, and for images that the net cannot read.
    """
    try:
        library: Any = importlib.import_module("timm")
    except ImportError as error:
        raise InputError("model=timm needs timm, which is not installed: pip install 'knep[timm]'") from error
    if name not in library.list_models():
        near = get_close_matches(str(name), library.list_models(), n=1, cutoff=0.0)[0]
        raise InputError(f"name must be a model of timm, got {name}: did you mean {near}?")
    given = dict(args or {})
    taken = next((key for key in _OF_DATA if key in given), None)
    if taken is not None:
        raise InputError(f"args.{taken} comes from the data, or fetches weights: leave it out")
    own = {"num_classes": num_classes, "in_chans": in_channels, "pretrained": False}
    try:
        try:
            model = library.create_model(name, **own, img_size=image_size, **given)  # of nets with a table of places
        except TypeError:
            model = library.create_model(name, **own, **given)
    except Exception as error:  # whatever a family's builder raises for values that it was not made for
        raise InputError(f"{name} cannot be built ({' '.join(str(error).split())[:120]}): change model.args") from error
    if not any(p.is_meta for p in model.parameters()):
        probe(model, torch.zeros(2, in_channels, image_size, image_size))
    return model

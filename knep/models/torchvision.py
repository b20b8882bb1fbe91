"""torchvision's image classifiers by name, fitted to the data: what a trick does to a net it was not written for."""

from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
import torchvision.models as tv
from torch import nn
from torch.func import functional_call
from torchvision.models import get_model, get_model_builder, list_models

from knep.errors import InputError
from knep.surgery.edit import replace

# The auxiliary heads return a tuple in training, which the loss could not read.
_SINGLE_HEAD = {"aux_logits": False, "init_weights": True}


def builder_options(name: str, image_size: int) -> dict[str, Any]:
    """What a family's builder has to be told besides the number of classes."""
    family = signature(get_model_builder(name)).return_annotation
    options = {
        tv.GoogLeNet: _SINGLE_HEAD,
        tv.Inception3: _SINGLE_HEAD,
        tv.VisionTransformer: {"image_size": image_size},
    }
    return options.get(family, {})


def _read_channels(model: nn.Module, in_channels: int) -> None:
    """Lets the first convolution read `in_channels` instead of 3; its weights start as PyTorch starts a convolution."""
    path, old = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if old.in_channels == in_channels:
        return
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # pyright: ignore[reportArgumentType]
        old.stride,  # pyright: ignore[reportArgumentType]
        old.padding,  # pyright: ignore[reportArgumentType]
        bias=old.bias is not None,
    )
    replace(model, path, new)


def _complaint(model: nn.Module, in_channels: int, image_size: int) -> str:
    """Why the model cannot read images of this size, or "". Shapes only: nothing is computed."""
    shapes = {k: v.to("meta") for k, v in (*model.named_parameters(), *model.named_buffers())}
    images = torch.empty(1, in_channels, image_size, image_size, device="meta")
    mode = model.training
    try:
        functional_call(model.eval(), shapes, (images,))
    except (RuntimeError, AssertionError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    finally:
        model.train(mode)
    return ""


def _remedy(model: nn.Module, in_channels: int, image_size: int) -> str:
    larger = range(image_size + 1, 257)
    fits = next((size for size in larger if not _complaint(model, in_channels, size)), None)
    return f"it takes {fits} pixels" if fits else "choose another model"


def torchvision(
    in_channels: int,
    num_classes: int,
    image_size: int,
    *,
    name: str = "resnet18",
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Images (N, in_channels, image_size, image_size) to class scores (N, num_classes) by one of torchvision's
    classifiers, untrained.

    The first convolution is replaced where in_channels is not 3; auxiliary heads are left out; a vision transformer
    is built for image_size. Such a net has no places: norms, activations and dropouts are exchanged where they stand.

    name: as in torchvision.models.list_models(module=torchvision.models); args: further keywords of its builder.
    Raises InputError for an unknown name, with the nearest, and for images that the net cannot read, with the least
    size from image_size on that it can.
    """
    names = list_models(module=tv)
    if name not in names:
        near = get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
        raise InputError(f"name must be a classifier of torchvision, got {name}: did you mean {near}?")
    try:
        options = builder_options(name, image_size) | dict(args or {})
        refused = next((key for key in ("weights", "weights_backbone", "num_classes") if key in options), None)
        if refused is not None:
            raise InputError(f"args.{refused} comes from the data, or fetches weights: leave it out")
        model = get_model(name, weights=None, num_classes=num_classes, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be built ({str(error)[:120]}): change model.args") from error
    except AssertionError as error:
        raise InputError(
            f"{name} cannot read images of {image_size} pixels: image_size must be a multiple of its patches ({error})"
        ) from error
    _read_channels(model, in_channels)
    complaint = _complaint(model, in_channels, image_size)
    if complaint:
        remedy = _remedy(model, in_channels, image_size)
        raise InputError(f"{name} cannot read images of {image_size} pixels: {remedy} ({complaint})")
    return model

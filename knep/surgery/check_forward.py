"""Running a model once on a sample: a failure is told by the layer that failed, what it got and what it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from knep.errors import InputError
from knep.surgery.record import hooked, mode


def expects(layer: nn.Module) -> str:
    """The input that a layer takes, or "" where its class does not tell."""
    if isinstance(layer, _ConvNd):
        return f"(N, {layer.in_channels}, {', '.join('DHW'[-len(layer.kernel_size) :])})"
    if isinstance(layer, nn.Linear):
        return f"(..., {layer.in_features})"
    if isinstance(layer, _NormBase):
        return f"(N, {layer.num_features}, ...)"
    if isinstance(layer, nn.GroupNorm):
        return f"(N, {layer.num_channels}, ...)"
    if isinstance(layer, nn.LayerNorm):
        return f"(..., {', '.join(map(str, layer.normalized_shape))})"
    return ""


def probe(model: nn.Module, sample: Tensor) -> Any:
    """The model's output for the first two images of `sample` (N, ...), in eval mode; every module's mode is restored.

    Raises InputError naming the innermost module that failed, with its input and what it takes.
    """
    inside: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
    names = {module: path for path, module in model.named_modules()}

    def enter(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        inside.append((names[module], module, inputs))

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        inside.pop()

    try:
        with torch.no_grad(), mode(model, False), hooked(names, enter, leave):
            return model(sample[:2])
    except InputError:
        raise
    except Exception as error:  # another's forward may raise anything
        raise InputError(_told(model, sample, inside, error)) from error


def _told(model: nn.Module, sample: Tensor, inside: list[Any], error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    path, layer, inputs = inside[-1] if inside else ("", model, (sample[:2],))
    got = ", ".join(_shown(x) for x in inputs) or "no positional input"
    takes = f" and takes {_kind(layer)}{expects(layer)}" if expects(layer) else ""
    where = f"{path} ({type(layer).__name__})" if path else type(layer).__name__
    return f"the model fails on a sample of shape {tuple(sample.shape)}: {where} got {got}{takes}: {text}"


def _kind(layer: nn.Module) -> str:
    like = next(layer.parameters(recurse=False), None)
    return f"{str(like.dtype).removeprefix('torch.')} " if like is not None and like.is_floating_point() else ""


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__

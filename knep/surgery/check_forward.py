"""Running a model once on a sample: a failure is told by the layer that failed, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from knep.errors import InputError
from knep.surgery.record import hooked, mode
from knep.surgery.sample import Inputs, call, like, rows, sampled, shown, told


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


def as_inputs(
    model: nn.Module, sample: Inputs | None, forward: Callable[[nn.Module, Any], Any] | None = None
) -> Inputs | None:
    """The sample on the model's device and in its dtype, with the function that runs the model on it, if there is one.

    Raises InputError for a function without a sample.
    """
    if forward is None:
        return None if sample is None else like(model, sample)
    if sample is None:
        raise InputError("forward= says how the model runs on a sample: give sample=, a batch, too")
    return like(model, replace(sampled(sample), forward=forward))


def probed(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs as the model has just run on them: the first two rows, all of them, or a list taken apart.

    Raises InputError as `probe` does, for the first of these.
    """
    try:
        probe(model, inputs)
        return inputs
    except InputError as error:
        sample, first = sampled(inputs), error
    ways = [replace(sample, whole=True)]
    if sample.forward is None and isinstance(sample.value, (list, tuple, dict)):
        ways = [replace(sample, spread=spread) for spread in (True, False)]
    for way in ways:
        try:
            probe(model, way)
            return way
        except InputError:
            continue
    raise first


def probe(model: nn.Module, sample: Inputs) -> Any:
    """The model's output for the first two images of `sample` (N, ...), in eval mode; every module's mode is restored.

    Raises InputError naming the innermost module that failed, with its input and what it takes.
    """
    inside: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
    names = {module: path for path, module in model.named_modules()}

    def enter(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        inside.append((names[module], module, inputs or tuple(named.values())))

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        inside.pop()

    try:
        with torch.no_grad(), mode(model, False), hooked(names, enter, leave):
            return call(model, rows(sample))
    except InputError:
        raise
    except Exception as error:  # another's forward may raise anything
        raise InputError(_told(model, sample, inside, error)) from error


def _told(model: nn.Module, sample: Inputs, inside: list[Any], error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    path, layer, inputs = inside[-1] if inside else ("", model, (sampled(rows(sample)).value,))
    got = ", ".join(map(shown, inputs)) or "no input"
    takes = f" and takes {_kind(layer)}{expects(layer)}" if expects(layer) else ""
    where = f"{path} ({type(layer).__name__})" if path else type(layer).__name__
    return f"the model fails on a sample {told(sample)}: {where} got {got}{takes}: {text}"


def _kind(layer: nn.Module) -> str:
    like = next(layer.parameters(recurse=False), None)
    return f"{str(like.dtype).removeprefix('torch.')} " if like is not None and like.is_floating_point() else ""

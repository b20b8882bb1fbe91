"""Records the functions that a forward pass calls, by modules or bare, with the gradients that come back to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from knep.observe.layer_stats import ENDS, LayerStats, alive, deviation, saturated, similarity
from knep.observe.rows import Layer
from knep.surgery.record import Recorder, name_of

_MULTIPLY = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS = ("matmul", "__matmul__", "mm", "addmm")  # with a parameter, as users write x @ self.weight + self.bias
_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_RELUS = ("relu", "relu_", "relu6", "threshold", "threshold_")
_BENDS = ("leaky_relu", "leaky_relu_", "rrelu", "prelu", "elu", "elu_", "celu", "selu", "gelu", "silu", "mish",
          "hardswish", "softplus", "softsign", "logsigmoid")  # fmt: skip
_ENDS = ("softmax", "log_softmax", "softmin")
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_SEEN = {*_MULTIPLY, *_NORMS, *_RELUS, *_BENDS, *_ENDS, *ENDS}
_PRECISE = 2**20  # numbers from which on float64 costs more than it tells


class Tape(Recorder):
    """Of passes of `images` images through a model, while it is open.

    layers: a row for each call; last: the function of the last row, with the storage that it wrote."""

    def __init__(self, model: nn.Module, images: int) -> None:
        self._paths = {module: path for path, module in model.named_modules()}
        super().__init__(self._paths)
        self.images = images
        self.layers: list[Layer] = []
        self.called: set[str] = set()
        self.last: tuple[str, Tensor] | None = None
        self._axis = 1  # of the channels, as the last layer with weights left them

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.called.add(self._paths[module])

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        if name in _DROPOUTS:  # what noise adds would pass for a signal
            return args[0]
        output = func(*args, **kwargs)
        if not self.inside or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        weight = _weight(name, args, kwargs)
        seen = name in _SEEN or weight is not None or _clamps(name, args, kwargs)
        if seen and output.numel() and output.numel() % self.images == 0:
            self._note(_known_as(name.rstrip("_"), args, kwargs), args, kwargs, weight, output)
        return output

    def _note(
        self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor | None, output: Tensor
    ) -> None:
        if weight is not None:
            self._axis = 1 if function.startswith("conv") else output.ndim - 1
        axis = min(self._axis, output.ndim - 1)
        module = self.inside[-1]
        row = Layer(self._paths[module] or "model", type(module).__name__ if _leaf(module) else function, function)
        row.units, row.features = output.shape[axis], output.numel() // self.images
        with torch.no_grad():
            if weight is not None:
                row.fan_in = _fan_in(function, weight)
                row.width = args[0].numel() // self.images if isinstance(args[0], Tensor) else row.fan_in
                row.scale = float(weight.detach().float().square().mean().sqrt()) * math.sqrt(row.fan_in)
            describe(row, output.detach(), self.images, axis)
            if function in ENDS:
                row.saturated = float(saturated(function, output.detach(), *_limits(args, kwargs)))
        self.layers.append(row)
        self.last = (function, output)
        if output.requires_grad:
            output.register_hook(lambda gradient: _returned(row, gradient, self.images))


def _known_as(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """A hard tanh that ends at 0 and 6 is a ReLU6, and what clamps at 0 a ReLU."""
    if name == "hardtanh" and _limits(args, kwargs)[0] == 0:
        return "relu6"
    return "relu" if name in ("clamp", "clamp_min") else name


def _limits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    """Where a hard tanh ends."""
    given = {"min_val": -1.0, "max_val": 1.0} | dict(zip(("min_val", "max_val"), args[1:], strict=False)) | kwargs
    return given["min_val"], given["max_val"]


def _clamps(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a clamp is a user's ReLU: from 0 upwards, without an end."""
    if name not in ("clamp", "clamp_min", "clamp_", "clamp_min_"):
        return False
    given = [*args[1:], *kwargs.values()]
    return [limit for limit in given if limit is not None] == [0]


def _weight(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a layer multiplies by."""
    if name in _MULTIPLY:
        return args[1] if len(args) > 1 else kwargs.get("weight")
    if name in _PRODUCTS:
        return next((a for a in args if isinstance(a, nn.Parameter) and a.ndim == 2), None)
    return None


def _fan_in(function: str, weight: Tensor) -> int:
    taps = weight.shape[2:].numel()
    if function.startswith("conv_transpose"):
        return weight.shape[0] * taps
    return weight.shape[1] * taps if function in _MULTIPLY else weight.shape[0]


def _leaf(module: nn.Module) -> bool:
    return all(name == "parametrizations" for name, _ in module.named_children())


def _returned(row: Layer, gradient: Tensor, images: int) -> None:
    g = gradient.detach().double()
    row.gradient = (row.gradient or 0.0) + float(deviation(g))
    row.flow = (row.flow or 0.0) + float(g.norm()) * math.sqrt(images)


def describe(row: Layer, output: Tensor, images: int, axis: int) -> None:
    """Fills the row with the statistics of an output whose first axis counts `images`, or parts of images in turn."""
    t = output.reshape(images, -1).to(torch.float64 if output.numel() < _PRECISE else torch.float32)
    stats = LayerStats.of(t)
    row.finite = stats.finite
    if stats.finite == 1:
        row.mean, row.std, row.size = stats.mean, stats.std, float(t.square().mean().sqrt())
        between = float(t.var(0, correction=0).mean().sqrt())
        row.spread = between / row.size if row.size > 0 else 0.0
        row.cosine = float(similarity(t))
    if row.function in (name.rstrip("_") for name in _RELUS):
        row.dead = float((~alive(output, axis)).float().mean())

"""Statistics of layers, computed here alone: `LayerStats` of a tensor; units that are dead, values that are saturated.

A look at a training step reads them of its input and of each layer's output. Numbers of layers stay on the device until
the look is closed, as a wait for each would cost more than the step: `signal` has the formulas, 0-dim, of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from knep.observe.update_stats import UpdateStats, read

_IMAGES, _FEWER = 64, 24  # of a batch that a reading takes in; that it compares with each other
_NUMBERS, _LEAST = 2**18, 8  # that a mean or a deviation is of where images have many, and the images at the least
_SETTLED = 40  # steps after which statistics of momentum 0.1 are those of the present weights
_FLAT = {nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.Hardsigmoid: "hardsigmoid", nn.Hardtanh: "hardtanh"}
_RECTIFIERS = (nn.ReLU, nn.ReLU6)
# Where the slope is below 5 % of the largest: of sigmoid s(1 - s) < 0.05 / 4, of tanh 1 - t^2 < 0.05; elsewhere an end.
ENDS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": lambda y, low, high: y * (1 - y) < 0.0125,
    "tanh": lambda y, low, high: 1 - y * y < 0.05,
    "hardtanh": lambda y, low, high: (y <= low) | (y >= high),
    "relu6": lambda y, low, high: y >= 6,
    "hardsigmoid": lambda y, low, high: (y <= 0) | (y >= 1),
}


@dataclass
class LayerStats:
    """Of the finite numbers of a tensor: the largest absolute one, mean, standard deviation; and the finite share."""

    largest: float
    mean: float
    std: float
    finite: float

    @classmethod
    def of(cls, values: Tensor) -> LayerStats:
        """In the tensor's own precision: float64 where nothing may overflow, float32 where time counts."""
        if not values.numel():
            return cls(0.0, 0.0, 0.0, 1.0)
        good = values.detach()
        mean, std, low, high = read([good.mean(), deviation(good), *good.aminmax()])
        if not math.isfinite(std):
            good = good[good.isfinite()]
            if not len(good):
                return cls(0.0, 0.0, 0.0, 0.0)
            mean, std, low, high = read([good.mean(), deviation(good), *good.aminmax()])
        return cls(max(abs(low), abs(high)), mean, std, good.numel() / values.numel())


@dataclass
class Values(LayerStats):
    """Of the first items of a batch (N, ...); apart: the mean deviation between them, 0 where all are the same, and
    where not all numbers are finite.
    """

    apart: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Values:
        values = values.detach()[:_IMAGES].float()
        found = cls(**vars(LayerStats.of(values)))
        if values.numel() and found.finite == 1:
            few = values[:_FEWER] - values[0]
            found.apart = float((few - few.mean(0)).square().mean(0).sqrt().mean()) if len(few) > 1 else found.std
        return found


def sample(t: Tensor) -> Tensor:
    """So many of the first items of t (N, ...) as a mean or a deviation takes in, float32."""
    items = max(_LEAST, _NUMBERS * len(t) // max(1, t.numel()))
    return t.detach()[: min(items, _IMAGES)].float()


def deviation(values: Tensor) -> Tensor:
    """Standard deviation, 0-dim, exactly 0 of equal values: quick passes in place of the slow one of torch.std.

    A mean of squares, since the norm of a million float32 numbers is wrong by 1e-5 on CPUs.
    """
    apart = values - values.flatten()[0]
    apart -= apart.mean()
    return apart.square_().mean().sqrt()


@dataclass
class Layer:
    """One call of a module: mean and deviation of its output; dead, saturated: the share of units, of values;
    similarity: the mean cosine between the outputs of two images; grad_std: of the gradient of the output;
    alive: which channels or units (C,) were above 0 for an image, of rectifiers; off, ratio: of batch norm, how far its
    running statistics are from those of the batch, in deviations and as a ratio of variances; settled: the steps after
    which they ought to fit; batch: images; real: 0 for what only looked like a rectifier's output.
    """

    path: str
    kind: str
    mean: float = 0.0
    std: float = 0.0
    dead: float | None = None
    saturated: float | None = None
    similarity: float = 0.0
    grad_std: float | None = None
    alive: Tensor | None = None
    off: float | None = None
    ratio: float = 1.0
    settled: float = 0.0
    batch: int = 0
    real: float = 1.0

    def plain(self) -> dict[str, Any]:
        names = ("path", "kind", "mean", "std", "dead", "saturated", "similarity", "grad_std")
        row = {name: getattr(self, name) for name in names}
        return {name: value for name, value in row.items() if value is not None}


Reading = tuple[str, Tensor]  # the name of a Layer's field, and what it is going to be, 0-dim


def signal(output: Tensor) -> Iterator[Reading]:
    """Of any layer's output (N, ...)."""
    values = sample(output)
    yield from (("mean", values.mean()), ("std", deviation(values)))
    yield "similarity", similarity(output.detach()[:_FEWER].float())


def ends(layer: Layer, module: nn.Module, output: Tensor) -> Iterator[Reading]:
    """Of the output (N, C, ...) of a rectifier, or of what has flat ends: the units or values that do not react."""
    values = output.detach()[:_IMAGES]
    name = next((name for kind, name in _FLAT.items() if isinstance(module, kind)), None)
    if isinstance(module, _RECTIFIERS):
        yield from rectified(layer, values)
    elif name is not None:
        low, high = getattr(module, "min_val", 0.0), getattr(module, "max_val", 1.0)
        yield "saturated", saturated(name, values.float(), low, high)


def rectified(layer: Layer, output: Tensor) -> Iterator[Reading]:
    """Of the output of a rectifier, also of a function such as F.relu: what share of its units no image reaches."""
    values = output.detach()[:_IMAGES]
    if values.ndim > 1:
        # The last axis has the units where the module works on tokens.
        layer.alive = alive(values, 1 if values.ndim in (2, 4, 5) else values.ndim - 1)
        yield "dead", (~layer.alive).float().mean()


def looks_rectified(t: Tensor) -> Tensor:
    """Whether values look like those behind a rectifier, 0-dim: none below 0, many at it."""
    values = t.detach()[:8]
    return (values >= 0).all() & ((values == 0).float().mean() > 0.05)


def alive(values: Tensor, axis: int) -> Tensor:
    """Which units (C,), along the axis, are above 0 somewhere; NaN is not dead."""
    wide = values if values.dtype.itemsize > 2 else values.float()  # many times as fast as half precision
    others = [i for i in range(values.ndim) if i != axis]
    return ~((wide.amax(others) if others else wide) <= 0)


def saturated(function: str, values: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """The share of an activation's values that lie at its flat ends, 0-dim; low, high: where a hard tanh ends."""
    return ENDS[function](values, low, high).float().mean()


def similarity(values: Tensor) -> Tensor:
    """The mean cosine between two different rows of (N, ...), 0-dim; a row of zeros has no direction."""
    flat = values.flatten(1) if values.ndim > 1 else values[:, None]
    n = len(flat)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return (unit.sum(0).square().sum() - unit.square().sum()) / max(1, n * (n - 1))


def statistics(layer: Layer, module: nn.Module, given: Tensor) -> Iterator[Reading]:
    """Of a batch norm that is given (N, C, ...): how far its running statistics lie from those of the batch."""
    if not isinstance(module, _BatchNorm) or module.running_mean is None or given.ndim < 2:
        return
    assert module.running_var is not None
    values, others = given.detach()[:_IMAGES].float(), [i for i in range(given.ndim) if i != 1]
    mean = values.mean(others, keepdim=True)
    var = (values - mean).square().mean(others).clamp_min(1e-12)  # a tenth of the time of torch.var_mean on CPUs
    kept = module.running_var.clamp_min(1e-12)
    yield "off", ((module.running_mean - mean.flatten()).abs() / var.sqrt()).median()
    yield "ratio", (kept / var).log().abs().median().clamp_max(80).exp()
    settled = _SETTLED if module.momentum is None else 2.5 / max(module.momentum, 1e-9)
    layer.settled = min(max(settled, _SETTLED), 10 * _SETTLED)


@dataclass
class Look:
    """All readings of one step; whole: of every layer the signal, not only what may be dead, saturated or stale;
    clipped: the share of the gradient's norm that clipping left, None where unknown; evenly: of every parameter;
    rates: of the parameter groups, (learning rate, momentum, weight decay).
    """

    step: int
    whole: bool = True
    input: Values | None = None
    first: Values | None = None  # of what the first layer with weights is given
    first_kind: str = ""
    output: Values | None = None
    probabilities: bool = False
    classes: int = 0
    doubled: bool | None = None  # the loss is the cross-entropy of these probabilities as scores; None: unknown
    layers: list[Layer] = field(default_factory=list)
    weights: list[UpdateStats] = field(default_factory=list)
    clipped: float | None = None
    evenly: bool = False
    rates: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def update(self) -> float:
        """The median of ||dw|| / ||w|| over the matrices that moved."""
        ratios = sorted(w.update for w in self.weights if w.matrix and w.update)
        return ratios[len(ratios) // 2] if ratios else 0.0

    @property
    def grad_norm(self) -> float:
        return math.sqrt(sum(w.grad_norm**2 for w in self.weights if w.grad_norm is not None))

    @cached_property
    def depth_ratio(self) -> float | None:
        """||gradient|| / ||weight|| of the first matrix over that of the last; None of fewer than three."""
        rows = [w for w in self.weights if w.matrix and w.grad_norm is not None and w.weight_norm > 0]
        if len(rows) < 3:
            return None
        relative = [(w.grad_norm or 0.0) / w.weight_norm for w in rows]
        return relative[0] / relative[-1] if relative[-1] > 0 and math.isfinite(relative[0]) else None

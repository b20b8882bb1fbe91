"""What a look at a training step reads of its input and of each layer's output.

Numbers of layers stay on the device until the look is closed: a wait for each would cost more than the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from knep.observe.update_stats import Weight, read

_IMAGES, _FEWER = 64, 24  # of a batch that a reading takes in; that it compares with each other
_NUMBERS, _LEAST = 2**18, 8  # that a mean or a deviation is of where images have many, and the images at the least
_SETTLED = 40  # steps after which statistics of momentum 0.1 are those of the present weights
_FLAT = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh)
_RECTIFIERS = (nn.ReLU, nn.ReLU6)


@dataclass
class Values:
    """Of a tensor's numbers (N, ...): mean, standard deviation, largest absolute one, the finite share; apart: the mean
    deviation between the first of the N items, 0 where all are the same.
    """

    mean: float
    std: float
    largest: float
    finite: float
    apart: float

    @classmethod
    def of(cls, t: Tensor) -> Values:
        values = t.detach()[:_IMAGES].float()
        if not values.numel():
            return cls(0.0, 0.0, 0.0, 1.0, 0.0)
        found = cls._read(values, 1.0)
        if math.isfinite(found.std):
            return found
        whole = values.isfinite()
        return cls._read(torch.where(whole, values, 0), float(whole.float().mean()))

    @classmethod
    def _read(cls, values: Tensor, finite: float) -> Values:
        std, few = deviation(values), values[:_FEWER] - values[0]
        apart = (few - few.mean(0)).square().mean(0).sqrt().mean() if len(few) > 1 else std
        mean, std, low, high, apart = read([values.mean(), std, *values.aminmax(), apart])
        return cls(mean, std, max(-low, high), finite, apart)


def sample(t: Tensor) -> Tensor:
    """So many of the first items of t (N, ...) as a mean or a deviation takes in, float32."""
    items = max(_LEAST, _NUMBERS * len(t) // max(1, t.numel()))
    return t.detach()[: min(items, _IMAGES)].float()


def deviation(values: Tensor) -> Tensor:
    """Standard deviation, 0-dim, exactly 0 of equal values: quick passes in place of the slow one of torch.std."""
    apart = values - values.flatten()[0]
    return (apart - apart.mean()).norm() / math.sqrt(values.numel())


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
    yield "similarity", _similarity(output.detach()[:_FEWER].float())


def ends(layer: Layer, module: nn.Module, output: Tensor) -> Iterator[Reading]:
    """Of the output (N, C, ...) of a rectifier, or of what has flat ends: the units or values that do not react."""
    values = output.detach()[:_IMAGES]
    if isinstance(module, _RECTIFIERS):
        yield from rectified(layer, values)
    elif isinstance(module, _FLAT):
        yield "saturated", _saturated(values.float(), module)


def rectified(layer: Layer, output: Tensor) -> Iterator[Reading]:
    """Of the output of a rectifier, also of a function such as F.relu: what share of its units no image reaches."""
    values = output.detach()[:_IMAGES]
    if values.ndim > 1:
        layer.alive = _alive(values)
        yield "dead", 1 - layer.alive.float().mean()


def looks_rectified(t: Tensor) -> Tensor:
    """Whether values look like those behind a rectifier, 0-dim: none below 0, many at it."""
    values = t.detach()[:8]
    return (values >= 0).all() & ((values == 0).float().mean() > 0.05)


def _alive(values: Tensor) -> Tensor:
    """Which units (C,) are above 0 somewhere; the last axis has them where the module works on tokens."""
    axis = 1 if values.ndim in (2, 4, 5) else values.ndim - 1
    # In float32 many times as fast as comparing in half precision; NaN is not dead.
    return ~(values.float().amax([i for i in range(values.ndim) if i != axis]) <= 0)


def _saturated(values: Tensor, module: nn.Module) -> Tensor:
    """The share of values whose slope is below a tenth of the largest one."""
    if isinstance(module, nn.Sigmoid):
        return (values * (1 - values) < 0.025).float().mean()
    if isinstance(module, nn.Tanh):
        return (1 - values * values < 0.1).float().mean()
    low, high = (module.min_val, module.max_val) if isinstance(module, nn.Hardtanh) else (0.0, 1.0)
    return ((values <= low) | (values >= high)).float().mean()


def _similarity(values: Tensor) -> Tensor:
    """The mean cosine between two different rows of (N, ...)."""
    flat = values.flatten(1) if values.ndim > 1 else values[:, None]
    n = len(flat)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
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
    clipped: the share of the gradient's norm that clipping left, None where unknown; rates: of the parameter groups,
    (learning rate, momentum, weight decay).
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
    weights: list[Weight] = field(default_factory=list)
    clipped: float | None = None
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

"""What a look at a training step reads: of the input, of each layer's output, of each parameter and its update."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_IMAGES, _FEWER = 64, 24  # of a batch that a reading takes in; that it compares with each other
_SETTLED = 40  # steps after which statistics of momentum 0.1 are those of the present weights
_FLAT = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh)
_RECTIFIERS = (nn.ReLU, nn.ReLU6)


@dataclass
class Values:
    """Of a tensor's numbers (N, ...): mean, standard deviation, largest absolute one, the finite share; apart: the mean
    deviation between the N items, 0 where all are the same.
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
        std, mean = (float(v) for v in torch.std_mean(values, correction=0))
        finite = 1.0
        if not math.isfinite(std):
            whole = values.isfinite()
            finite = float(whole.float().mean())
            values = torch.where(whole, values, 0)
            std, mean = (float(v) for v in torch.std_mean(values, correction=0))
        low, high = values.aminmax()
        apart = float(values.std(0, correction=0).mean()) if len(values) > 1 else std
        return cls(mean, std, max(-float(low), float(high)), finite, apart)


@dataclass
class Layer:
    """One call of a module: mean and deviation of its output; dead, saturated: the share of units, of values;
    similarity: the mean cosine between the outputs of two images; grad_std: of the gradient of the output;
    alive: which channels or units (C,) were above 0 for an image, of rectifiers; norm: of batch norm, how far its
    running statistics are from those of the batch, in deviations and as a ratio of variances, and the steps after
    which they ought to fit; batch: images.
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
    norm: tuple[float, float, float] | None = None
    batch: int = 0

    def plain(self) -> dict[str, Any]:
        row = {k: v for k, v in asdict(self).items() if k not in ("alive", "norm", "batch")}
        return {k: v for k, v in row.items() if v is not None}


def layer_of(path: str, module: nn.Module, output: Tensor, rectified: bool = False) -> Layer:
    """The reading of an output (N, C, ...); rectified: it comes out of a function such as F.relu."""
    values = output.detach()[:_IMAGES].float()
    std, mean = torch.std_mean(values, correction=0)
    layer = Layer(path, type(module).__name__, float(mean), float(std), batch=len(output))
    layer.similarity = _similarity(values)
    if (rectified or isinstance(module, _RECTIFIERS)) and values.ndim > 1:
        layer.alive = _alive(values)
        layer.dead = 1 - float(layer.alive.float().mean())
    elif isinstance(module, _FLAT):
        layer.saturated = _saturated(values, module)
    return layer


def _alive(values: Tensor) -> Tensor:
    """Which units (C,) are above 0 somewhere; the last axis has them where the module works on tokens."""
    axis = 1 if values.ndim in (2, 4, 5) else values.ndim - 1
    return (~(values <= 0)).any(tuple(i for i in range(values.ndim) if i != axis))  # NaN is not dead


def _saturated(values: Tensor, module: nn.Module) -> float:
    """The share of values whose slope is below a tenth of the largest one."""
    if isinstance(module, nn.Sigmoid):
        return float((values * (1 - values) < 0.025).float().mean())
    if isinstance(module, nn.Tanh):
        return float((1 - values * values < 0.1).float().mean())
    low, high = (module.min_val, module.max_val) if isinstance(module, nn.Hardtanh) else (0.0, 1.0)
    return float(((values <= low) | (values >= high)).float().mean())


def _similarity(values: Tensor) -> float:
    """The mean cosine between two different rows of (N, ...)."""
    flat = values[:_FEWER].flatten(1) if values.ndim > 1 else values[:, None]
    n = len(flat)
    if n < 2:
        return 0.0
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return (float(unit.sum(0).square().sum()) - float(unit.square().sum())) / (n * (n - 1))


def norm_gap(module: Any, values: Tensor) -> tuple[float, float, float] | None:
    """How far a batch norm's running statistics lie from those of its input: (deviations, ratio of variances, steps
    after which they ought to fit).
    """
    if module.running_mean is None or values.ndim < 2:
        return None
    rest = tuple(i for i in range(values.ndim) if i != 1)
    var, mean = torch.var_mean(values.detach().float(), rest, correction=0)
    spread = var.clamp_min(1e-12).sqrt()
    off = float(((module.running_mean - mean).abs() / spread).median())
    ratio = float((module.running_var.clamp_min(1e-12) / var.clamp_min(1e-12)).log().abs().median())
    settled = _SETTLED if module.momentum is None else 2.5 / max(module.momentum, 1e-9)
    return off, math.exp(min(ratio, 80.0)), min(max(settled, _SETTLED), 10 * _SETTLED)


@dataclass
class Weight:
    """A parameter at a step: norms of its gradient (None without one) and of itself, ||dw|| / ||w|| of the step, the
    share of its elements with gradient that the step left as they were; alike: all rows of the weight are equal, and
    all rows of its gradient.
    """

    path: str
    size: int
    matrix: bool
    grad_norm: float | None
    weight_norm: float
    update: float = 0.0
    stuck: float | None = None
    alike: bool = False
    half: bool = False

    def plain(self) -> dict[str, Any]:
        row = {"path": self.path, "weight_norm": self.weight_norm, "update": self.update}
        return row | ({} if self.grad_norm is None else {"grad_norm": self.grad_norm})


def weight_of(path: str, p: Tensor, before: Tensor | None, first: bool) -> Weight:
    """The reading of a parameter behind a step; before: a copy from in front of it, None where it is not followed."""
    w, grad = p.detach(), p.grad
    found = Weight(path, p.numel(), p.ndim > 1, None, float(w.norm(dtype=_precise(w))))
    found.half = w.dtype in (torch.float16, torch.bfloat16)
    if grad is not None:
        found.grad_norm = float(grad.norm(dtype=_precise(grad)))
    if before is not None:
        size = float(before.norm(dtype=_precise(before)))
        change = (w.float() - before.float()).norm() if found.half else (w - before).norm()
        found.update = float(change) / size if size else 0.0
        if found.half and grad is not None and found.grad_norm:
            moved = grad != 0
            found.stuck = float((w == before)[moved].float().mean())
    if first and found.matrix:
        found.alike = _rows_alike(before if before is not None else w) and (grad is None or _rows_alike(grad))
    return found


def _precise(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _rows_alike(t: Tensor) -> bool:
    """Whether the units of a layer (rows) are copies of each other; a single row has no copy."""
    return len(t) > 1 and bool((t[1:] == t[:1]).all())


@dataclass
class Look:
    """All readings of one step; clipped: the share of the gradient's norm that clipping left, None where unknown;
    rates: of the parameter groups, (learning rate, momentum, weight decay); calls: the inputs of the weighted layers.
    """

    step: int
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


def fresh(p: Tensor) -> bool:
    """Whether a weight is as a usual initialisation draws it: uniform or normal, of a deviation that its fans give."""
    if p.ndim < 2 or p.numel() < 64:
        return False
    w = p.detach().float()
    area = w[0][0].numel()
    inward, outward = w.shape[1] * area, w.shape[0] * area
    std = float(w.std())
    if std == 0 or abs(float(w.mean())) > 4 * std / math.sqrt(w.numel()):
        return False
    usual = (1 / (3 * inward), 1 / inward, 2 / inward, 2 / outward, 2 / (inward + outward), 0.02**2)
    slack = 3 / math.sqrt(w.numel()) + 0.01
    shape = float((w / std).pow(4).mean())
    drawn = min(abs(shape - 1.8), abs(shape - 3.0)) < 0.1 + 15 / math.sqrt(w.numel())
    return drawn and any(abs(std / math.sqrt(v) - 1) < slack for v in usual)

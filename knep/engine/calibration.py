"""Temperature scaling: scores divided by one number that is fitted on the validation split (Guo et al. 2017, sec. 4.2).

The number goes into the output layer, so that whatever reads the weights, an export too, has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from knep.data.base import ImageData
from knep.engine.module import Classifier
from knep.errors import InputError
from knep.tasks.base import Weighted

_WIDEST = 4.0  # T is looked for in exp(-4) .. exp(4)
BINS = 15


@dataclass(frozen=True)
class Calibrated:
    """temperature: that the scores were divided by; before, after: expected calibration error on validation."""

    temperature: float
    before: float
    after: float


def temperature_of(scores: Tensor, labels: Tensor) -> float:
    """T > 0 at which scores / T have the least cross-entropy; scores float (N, K), labels int64 (N,)."""
    z, y = scores.double(), labels

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(z / math.exp(log_t), y))

    found = minimize_scalar(loss, bounds=(-_WIDEST, _WIDEST), method="bounded")
    return math.exp(float(found.x))


def reliability(confidence: Tensor, right: Tensor) -> Tensor:
    """float64 (BINS, 3): of equal bins of the confidence the count, the summed confidence, and how many were right."""
    place = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    columns = (torch.ones_like(confidence), confidence, right)
    return torch.stack([torch.bincount(place, weights=c.double(), minlength=BINS) for c in columns], dim=1).cpu()


def calibration_error(bins: Tensor) -> float:
    """Expected calibration error: sum over bins of |right - confidence| / N (Naeini et al. 2015)."""
    return float((bins[:, 2] - bins[:, 1]).abs().sum() / bins[:, 0].sum().clamp_min(1))


@torch.no_grad()
def output_layer(module: Classifier, x: Tensor) -> nn.Module:
    """The layer whose weights and bias scale all scores. Raises InputError where the model has none.

    x: raw rows that the module reads.
    """
    was = module.training
    module.eval()
    wanted = module(x) / 2
    try:
        for layer in reversed([m for m in module.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]):
            before = _parts(layer)
            _scale(layer, 0.5)
            same = torch.allclose(module(x), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max() + 1))
            for name, value in before.items():
                setattr(layer, name, value) if _made(layer, name) else getattr(layer, name).copy_(value)
            if same:
                return layer
    finally:
        module.train(was)
    raise InputError(
        "calibrate=true divides the scores by a number in the output layer, and this model has no linear layer at its "
        "end that gives them: leave it out"
    )


def _parts(layer: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(layer, name).clone() for name in ("weight", "bias") if getattr(layer, name, None) is not None}


def _made(layer: nn.Module, name: str) -> bool:
    """Whether a parametrization makes this part, which is then set as a whole."""
    return name in getattr(layer, "parametrizations", ())


def _scale(layer: nn.Module, factor: float) -> None:
    for name, value in _parts(layer).items():
        setattr(layer, name, value * factor) if _made(layer, name) else getattr(layer, name).mul_(factor)


@torch.no_grad()
def calibrate(module: Classifier, data: ImageData) -> Calibrated:
    """Fits T on the validation split and divides the output layer's weights and bias by it."""
    module.eval()
    device = next(module.parameters()).device
    scores, labels = [], []
    for x, target in data.val_dataloader():
        y = target.target if isinstance(target, Weighted) else target
        scores.append(module(x.to(device)).float().cpu()[y.cpu() >= 0])
        labels.append(y.cpu()[y.cpu() >= 0])
    z, y = torch.cat(scores), torch.cat(labels)
    t = temperature_of(z, y)
    _scale(output_layer(module, data.sample(8).to(device)), 1 / t)
    before, after = (_error(z / divisor, y) for divisor in (1.0, t))
    return Calibrated(t, before, after)


def _error(scores: Tensor, labels: Tensor) -> float:
    confidence, predicted = scores.softmax(1).max(1)
    return calibration_error(reliability(confidence, predicted == labels))

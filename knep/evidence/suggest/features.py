"""What tells problems apart at the cost of one step: size, depth, kinds of layers, rows, gradients at step 0."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from knep.config.schema import RunConfig
from knep.data.base import ImageData
from knep.engine.build import build_module, spec_of
from knep.engine.module import Classifier
from knep.nn.kinds import is_norm

STORED = Path(__file__).with_name("features.json")
_KIND = 1.5  # of other data or another task, of which the ledger has none: beyond what its workloads differ by
_MOST_STEEP = 4.0  # decades between the first layer's gradient and the last one's: beyond, a signal is gone or explodes


@dataclass(frozen=True)
class Features:
    """Of a net and its data, before the first step.

    parameters: how many; depth: layers with a matrix or kernel; convolutions, norms: 1.0 where there are any; images,
    classes: 1.0 where rows are images, and one class of several is learned; rows: of training; gradient: log10 of the
    first such layer's gradient over the last one's, root mean squares.
    """

    parameters: int
    depth: int
    convolutions: float
    norms: float
    images: float
    classes: float
    rows: int
    gradient: float

    @property
    def vector(self) -> tuple[float, ...]:
        """On scales of which one is a difference that may matter: a decade, a doubling or two, a kind of layer."""
        return (
            math.log10(max(1, self.parameters)),
            math.log2(max(1, self.depth)) / 2,
            self.convolutions,
            self.norms,
            _KIND * self.images,
            _KIND * self.classes,
            math.log10(max(1, self.rows)),
            self.gradient / 2,
        )


def of_run(run: RunConfig, data: ImageData) -> Features:
    """Builds the net of a run and passes one batch through it, there and back. data: prepared.

    Raises InputError as training does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        module = build_module(run, spec_of(run, data), data, seed=run.seed)
        batch = next(iter(data.train_dataloader()))
        x, target = module.task.split(batch)
        layers = [p for p in module.model.parameters() if p.ndim >= 2]
        batches = data.train_batches
        rows = len(x) * (int(batches) if math.isfinite(batches) else 1)
        kinds = list(module.model.modules())
        return Features(
            parameters=sum(p.numel() for p in module.model.parameters()),
            depth=len(layers),
            convolutions=float(any(isinstance(m, _ConvNd) for m in kinds)),
            norms=float(any(map(is_norm, kinds))),
            images=float(torch.is_tensor(x) and x.ndim == 4),
            classes=float(run.task_name == "multiclass"),
            rows=rows,
            gradient=_steepness(module, x, target, layers),
        )


def _steepness(module: Classifier, x: Any, target: Any, layers: list[nn.Parameter]) -> float:
    known = [p for p in layers if p.requires_grad]
    if len(known) < 2:
        return 0.0
    module.model.train()
    loss = module.task.loss(module.model(module.scaling(x)), target)
    gradients = torch.autograd.grad(loss, known, allow_unused=True)
    first, last = (
        float(g.double().square().mean().sqrt()) if g is not None else 0.0 for g in (gradients[0], gradients[-1])
    )
    if not (first > 0 and last > 0 and math.isfinite(first) and math.isfinite(last)):
        return 0.0 if first == last else -_MOST_STEEP if first < last else _MOST_STEEP
    return round(min(_MOST_STEEP, max(-_MOST_STEEP, math.log10(first / last))), 3)


@lru_cache
def stored() -> dict[str, Features]:
    """Workload of the ledger -> its features, measured by `python -m scripts.suggest --features`."""
    return {name: Features(**values) for name, values in json.loads(STORED.read_text(encoding="utf-8")).items()}


def as_text(found: dict[str, Features]) -> str:
    """The stored file."""
    return json.dumps({name: asdict(one) for name, one in found.items()}, indent=1) + "\n"

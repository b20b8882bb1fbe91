"""The size of the signal in every layer at the start, forward and backward: what an initialisation decides."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from knep.config.instantiate import instantiate
from knep.config.schema import DataSpec, RunConfig
from knep.engine.build import build_module
from knep.observe.layer_stats import LayerStats
from knep.surgery.record import hooked


@dataclass
class Signal:
    """Standard deviations, a value per layer with weights in the order of the forward pass.

    forward: of the layer's output; backward: of the loss's gradient by that output.
    """

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)


def signal(run: RunConfig) -> Signal:
    """Measured on one training batch before the first step, in float64, where 50 layers neither over- nor underflow.

    Raises InputError for a run that cannot be built.
    """
    data = instantiate(run.data)
    data.prepare()
    module = build_module(run, DataSpec.of(data), data, seed=run.seed)
    x, y = next(iter(data.train_dataloader()))
    found, model = Signal(), module.model.double()
    images = module.scaling(x).double()
    outputs: list[Tensor] = []
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    with hooked(layers, leave=lambda layer, args, output: outputs.append(output)):
        loss = nn.functional.cross_entropy(model(images), y)
    gradients = torch.autograd.grad(loss, outputs)
    found.forward = [LayerStats.of(out).std for out in outputs]
    found.backward = [LayerStats.of(gradient).std for gradient in gradients]
    return found

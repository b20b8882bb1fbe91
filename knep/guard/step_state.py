"""One pass of a step, with all that it depends on: enough to repeat it to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knep.guard.finite import digest, first_bad
from knep.guard.guarded import Guarded
from knep.observe.layer_table import Table, watched
from knep.optim.gradients import gradients, scale_
from knep.tasks.base import Batch
from knep.utils.rng import set_rng_state


@dataclass
class Moment:
    """What a forward and backward pass starts from, beside the weights and buffers, which are in the module.

    batch: as the training step gets it; rng: generator state of the CPU, and of the device; gradients: those that
    micro-batches before it have left; weight: of this micro-batch among the `window` of them; epoch: of the
    augmentation; scale: on the gradients after the last micro-batch.
    """

    batch: Batch
    rng: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    weight: float
    window: int
    epoch: int
    scale: float = 1.0


@dataclass
class Pass:
    """What a pass came to. loss: as backward sees it; gradients: digest after clipping; bad: the first bad tensor of
    the gradients; table: layer by layer."""

    loss: float
    gradients: str
    bad: str | None
    table: Table


def grads(module: Guarded) -> dict[str, Tensor]:
    """The gradients of the model, by parameter."""
    return {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}


def repeat(module: Guarded, moment: Moment, context: Callable[[], AbstractContextManager[Any]]) -> Pass:
    """Runs the pass, watching each layer; gradients are left as it leaves them.

    context: the autocast of the run's precision.
    """
    for name, p in module.model.named_parameters():
        kept = moment.gradients.get(name)
        p.grad = None if kept is None else kept.to(p.device, copy=True)
    module.augment.epoch = moment.epoch
    set_rng_state(moment.rng, module.device)
    with watched(module.model) as table, torch.enable_grad():
        with context():
            loss = module.step.loss(moment.batch, moment.weight).total
            if moment.window > 1:
                loss = loss / moment.window
        loss.backward()
    if moment.scale != 1:
        scale_(gradients(module.model.parameters()), moment.scale)
    module.step.clip()
    found = grads(module)
    return Pass(float(loss.detach()), digest(found.items()), first_bad(found.items()), table)

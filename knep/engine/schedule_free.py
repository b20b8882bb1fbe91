"""Optimizers of two points (schedule-free): they train at one, and are evaluated at the other, an average of the path.

Batch norm's running statistics describe the first. Those of the average are estimated on training images before each
validation, as its authors do (Defazio et al. 2024), and in each checkpoint that is saved beside one.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.recipes.averaging import reestimate

# Batches of training images that statistics are estimated on, as many as averaging=ema takes.
_BATCHES = 20


def has_two_points(optimizer: Optimizer) -> bool:
    """Whether the optimizer goes to the weights that it is evaluated at by `eval`, and back by `train`."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def statistics(model: nn.Module) -> list[Tensor]:
    """The buffers of the model's batch norms, themselves."""
    return [b for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for b in m.buffers()]


def put_back(live: list[Tensor], kept: list[Tensor]) -> None:
    """Copies each of `kept` into its tensor of `live`."""
    for tensor, value in zip(live, kept, strict=True):
        tensor.copy_(value)


def estimate(trainer: Trainer, module: LightningModule) -> list[Tensor]:
    """Batch-norm statistics of the present weights; returns what they were. Draws of the run stay as they are."""
    kept = [b.clone() for b in statistics(module)]
    if kept:
        with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
            torch.manual_seed(0)
            reestimate(trainer, module, _BATCHES)
    return kept


class Average:
    """The average of a fit of `module`, entered to evaluate and left to train.

    A checkpoint has the average as its `state_dict`, and beside it, as `current_model_state`, the training's weights.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module, self._trainer = module, module.trainer
        self._inside = False
        self._training: list[Tensor] = []  # statistics, while inside
        self._own: dict[str, Tensor] = {}  # the average after this step, since to go there and back rounds
        self._step = -1

    def begin(self, weights: dict[str, Tensor] | None) -> None:
        """Before the first step, or where a checkpoint has been loaded; weights: those that training goes on from."""
        self._switch("train")
        if weights is not None:
            self._module.load_state_dict(weights)

    @torch.no_grad()
    def enter(self) -> None:
        if self._inside:
            return
        self._inside = True
        self._switch("eval")
        if self._step == self._trainer.global_step:
            self._training = [b.clone() for b in statistics(self._module)]
            self._module.load_state_dict(self._own)
            return
        self._training = estimate(self._trainer, self._module)
        self._own, self._step = _copied(self._module), self._trainer.global_step

    @torch.no_grad()
    def leave(self) -> None:
        self._inside = False
        self._switch("train")
        put_back(statistics(self._module), self._training)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Puts both into the checkpoint; the module is left to the bit as it is."""
        if self._inside or "averaging_state" in checkpoint:
            return
        weights = _copied(self._module)
        self.enter()
        checkpoint["state_dict"], checkpoint["current_model_state"] = _copied(self._module), weights
        if "optimizer_states" in checkpoint:
            states = [self._trainer.strategy.optimizer_state(o) for o in self._trainer.optimizers]
            checkpoint["optimizer_states"] = states
        self.leave()
        self._module.load_state_dict(weights)

    def _switch(self, mode: str) -> None:
        for optimizer in self._trainer.optimizers:
            getattr(optimizer, mode)()


def _copied(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def average_of(module: LightningModule) -> Average | None:
    """The average of a fit of `module`; None where its optimizer is evaluated where it trains."""
    return Average(module) if all(has_two_points(o) for o in module.trainer.optimizers) else None

"""Weights, averages and optimizer state of the last checkpoint, kept in memory to go back to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from knep.guard.guarded import Guarded
from knep.recipes.averaging import average_in

# What a schedule sets in a parameter group: it goes on where it is.
_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum")


class Snapshot:
    """What a fit trains, copied; or what a checkpoint kept of such a copy."""

    def __init__(self, module: Guarded, kept: dict[str, Any] | None = None) -> None:
        self._live = _trained(module)
        self._tensors = kept["tensors"] if kept else [t.detach().clone() for t in self._live]
        optimizers = module.trainer.optimizers
        self._optimizers = kept["optimizers"] if kept else [copy.deepcopy(o.state_dict()) for o in optimizers]

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self._tensors, "optimizers": self._optimizers}

    def restore(self, module: Guarded) -> None:
        """Puts everything back but the schedule, which goes on."""
        with torch.no_grad():
            for live, kept in zip(self._live, self._tensors, strict=True):
                live.copy_(kept)
        for optimizer, kept in zip(module.trainer.optimizers, self._optimizers, strict=True):
            now = optimizer.state_dict()["param_groups"]
            groups = [
                {**then, **{k: group[k] for k in _SCHEDULED if k in group}}
                for then, group in zip(kept["param_groups"], now, strict=True)
            ]
            optimizer.load_state_dict(copy.deepcopy({"state": kept["state"], "param_groups": groups}))


def _trained(module: Guarded) -> list[Tensor]:
    averages = map(average_in, module.trainer.callbacks)  # type: ignore[attr-defined]
    models = [module.model, *(a for a in averages if a is not None)]
    return [t for model in models for t in (*model.parameters(), *model.buffers())]

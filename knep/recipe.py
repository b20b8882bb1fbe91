"""A recipe: one choice per slot, together, for any `nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from knep.errors import InputError, NoEffectError
from knep.groups import param_groups
from knep.regularizer import Regularizer
from knep.safe import instantiate
from knep.surgery import Change

MODEL_SLOTS = ("norm", "activation", "dropout", "init")
SLOTS = (
    "scaling",
    "augment",
    *MODEL_SLOTS,
    "optimizer",
    "clip",
    "scheduler",
    "regularization",
    "averaging",
    "stopping",
)
# Keys of a slot's node that say how the training loop uses the trick; the trick itself never sees them.
_BESIDE = ("accumulate", "interval", "monitor")


@dataclass(frozen=True)
class Report:
    """What a recipe did to a model: slot -> the edits, layer by layer."""

    changes: Mapping[str, list[Change]]

    def __str__(self) -> str:
        return "\n".join(
            f"{slot:10} {c.path}: {c.before} -> {c.after}" for slot, cs in self.changes.items() for c in cs
        )


@dataclass
class Recipe:
    """The slots of one recipe, instantiated. Build it with `from_config`; every part is usable alone."""

    model_slots: dict[str, Callable[..., list[Change]]]
    make_scaling: Callable[[Iterable[Tensor]], nn.Module]
    augment: nn.Module
    make_optimizer: Callable[..., torch.optim.Optimizer]
    clip: Callable[[Iterable[Tensor]], Tensor]
    make_scheduler: Callable[..., Any]
    regularization: Regularizer
    averaging: Any
    stopping: Callback
    lr: float
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    accumulate: int | str = 1
    schedule_at: dict[str, str] = field(default_factory=lambda: {"interval": "step"})

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Recipe:
        """From a composed config with one node per slot. Raises InputError naming the slot that cannot be built."""
        nodes = {slot: _slot_node(cfg, slot) for slot in SLOTS}
        beside = {slot: {k: nodes[slot].pop(k) for k in _BESIDE if k in nodes[slot]} for slot in ("optimizer",)}
        at = {k: nodes["scheduler"].pop(k) for k in ("interval", "monitor") if k in nodes["scheduler"]}
        built = {slot: _build(slot, node) for slot, node in nodes.items()}
        return cls(
            model_slots={slot: built[slot] for slot in MODEL_SLOTS},
            make_scaling=built["scaling"],
            augment=built["augment"],
            make_optimizer=built["optimizer"],
            clip=built["clip"],
            make_scheduler=built["scheduler"],
            regularization=built["regularization"],
            averaging=built["averaging"],
            stopping=built["stopping"],
            lr=nodes["optimizer"]["lr"],
            weight_decay=nodes["optimizer"].get("weight_decay") or 0.0,
            layer_decay=cfg.get("layer_decay", 1.0),
            accumulate=beside["optimizer"].get("accumulate", cfg.get("accumulate", 1)),
            schedule_at={"interval": "step"} | at,
        )

    @property
    def members(self) -> int:
        """How many independent models a run trains: 1, or more for an ensemble."""
        return self.averaging.members

    def apply(self, model: nn.Module, sample: Tensor | None = None) -> Report:
        """Norm, activation, dropout and init, in place, in this order.

        sample: scaled images (N, C, H, W) for the tricks that look at the data.
        Raises NoEffectError where a chosen trick found nothing to change.
        """
        changes = {}
        for slot, trick in self.model_slots.items():
            with named(slot):
                changes[slot] = trick(model, sample=sample)
        return Report(changes)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the model's parameter groups: no decay on norms and biases, layer-wise rates."""
        with named("optimizer"):
            groups = param_groups(model, lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay)
            return self.make_optimizer(groups)

    def scheduler(self, optimizer: torch.optim.Optimizer, *, total_steps: int, steps_per_epoch: int) -> Any:
        """The learning-rate schedule; counts are optimizer steps."""
        with named("scheduler"):
            return self.make_scheduler(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    def scaling(self, batches: Iterable[Tensor]) -> nn.Module:
        """The input scaling, fitted on raw batches (N, C, H, W) of the training split."""
        with named("scaling"):
            return self.make_scaling(batches)


def _slot_node(cfg: Mapping[str, Any], slot: str) -> dict[str, Any]:
    if slot not in cfg:
        raise InputError(f"the config has no slot {slot}: add `- {slot}: none` to its defaults")
    return dict(cfg[slot])


def _build(slot: str, node: dict[str, Any]) -> Any:
    with named(slot):
        return instantiate(node)


@contextmanager
def named(slot: str) -> Any:
    """Errors about a value say which slot they come from."""
    try:
        yield
    except NoEffectError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        text = " ".join(str(error).split())
        raise InputError(text if text.startswith(slot) else f"{slot}: {text}") from error

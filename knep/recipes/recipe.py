"""A recipe: one choice per slot, together, for any `nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from knep.config.catalog import SLOTS as SLOTS  # the order in which they act
from knep.config.external_app import resolved, slot_node
from knep.config.instantiate import instantiate
from knep.errors import InputError, named
from knep.optim.param_groups import param_groups
from knep.recipes.regularization import Regularizer
from knep.surgery.check_forward import probe
from knep.surgery.edit import Change, _beside, bare, copied
from knep.utils.monitors import mode_of

if TYPE_CHECKING:
    from typing_extensions import Self

MODEL_SLOTS = ("norm", "activation", "dropout", "init")
# Slots whose options are functions still to be called.
_LATER = (*MODEL_SLOTS, "model", "scaling", "optimizer", "clip", "scheduler")
# Keys of a slot's node that say how the training loop uses the trick; the trick itself never sees them.
_BESIDE = ("accumulate", "interval", "monitor")


@dataclass(frozen=True)
class Report:
    """What a recipe did to a model: slot -> the edits, layer by layer; and the model that has them."""

    changes: Mapping[str, list[Change]]
    model: nn.Module

    def __str__(self) -> str:
        return "\n".join(
            f"{slot:10} {c.path}: {c.before} -> {c.after}" for slot, cs in self.changes.items() for c in cs
        )


@dataclass
class Recipe:
    """The slots of one recipe, instantiated: from `knep.load` or `from_config`. Every part is usable alone.

    lr, weight_decay: of the optimizer; layer_decay: factor on lr per layer below the head; accumulate: micro-batches
    per optimizer step, or "epoch"; max_epochs: how long the recipe trains, None where it does not say.
    clip: edits the gradients of `recipe.clip(model.parameters())` in place, returns their norm before that.
    """

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
    max_epochs: int | None = None
    schedule_at: dict[str, str] = field(default_factory=lambda: {"interval": "step"})

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Self:
        """From a composed config with one node per slot: one of knep's own, or the DictConfig of another Hydra app.

        A slot that the config leaves out is `none`; the optimizer must be there. A DictConfig is resolved, and checked
        for options that contradict each other, which knep's own configs were already.
        Raises InputError naming the slot that cannot be built.
        """
        if isinstance(cfg, DictConfig):
            cfg = resolved(cfg, SLOTS)
        nodes = {slot: slot_node(cfg, slot) for slot in SLOTS}
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
            lr=_rate(nodes["optimizer"]),
            weight_decay=nodes["optimizer"].get("weight_decay") or 0.0,
            layer_decay=cfg.get("layer_decay", 1.0),
            accumulate=beside["optimizer"].get("accumulate", cfg.get("accumulate", 1)),
            max_epochs=(cfg.get("trainer") or {}).get("max_epochs"),
            schedule_at={"interval": "step"} | at,
        )

    @property
    def members(self) -> int:
        """How many independent models a run trains: 1, or more for an ensemble."""
        return self.averaging.members

    @property
    def watched(self) -> dict[str, str]:
        """Slot -> the validation metric that it follows."""
        found = {slot: getattr(getattr(self, slot), "monitor", None) for slot in ("stopping", "averaging")}
        found["scheduler"] = self.schedule_at.get("monitor")
        return {slot: str(monitor) for slot, monitor in found.items() if str(monitor).startswith("val/")}

    def apply(self, model: nn.Module, sample: Tensor | None = None, *, inplace: bool = True) -> Report:
        """Norm, activation, dropout and init, in this order: edits `model` itself, or with inplace=False a copy of it.

        sample: scaled images (N, C, H, W), for the tricks that look at the data and to see that the model runs. The
        changed model is `report.model`.
        Raises NoEffectError where a chosen trick found nothing to change, InputError for a model that fails on the
        sample, naming the layer, or that cannot be copied.
        """
        target = bare(model) if inplace else bare(copied(model))
        sample = _beside(target, sample)
        if sample is not None:
            probe(target, sample)
        changes = {}
        for slot, trick in self.model_slots.items():
            with named(slot):
                changes[slot] = trick(target, sample=sample)
        return Report(changes, model if inplace else target)

    def optimizer(self, model: nn.Module, sample: Tensor | None = None) -> torch.optim.Optimizer:
        """The optimizer over the model's parameter groups: no decay on norms and biases, layer-wise rates.

        sample: scaled images (N, C, H, W); with it, layer-wise rates follow the order in which layers act on it.
        """
        traced = sample is not None and self.layer_decay < 1
        extra: dict[str, Any] = {"sample": _beside(model, sample)} if traced else {}
        with named("optimizer"):
            groups = param_groups(
                model, lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay, **extra
            )
            return self.make_optimizer(groups)

    def scheduler(
        self, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: int | None = None
    ) -> LRScheduler:
        """The learning-rate schedule; counts are optimizer steps. Call its `step()` after each of them.

        steps_per_epoch: read by schedules that count epochs (exponential, step, multistep, plateau); without it,
        total_steps over the recipe's own number of epochs. `plateau` is stepped once a validation, with the metric
        that `scheduler.monitor` names.
        """
        if steps_per_epoch is None:
            steps_per_epoch = max(1, round(total_steps / (self.max_epochs or 1)))
        rising = {"mode": "max"} if mode_of(self.schedule_at.get("monitor", "")) == "max" else {}
        with named("scheduler"):
            return self.make_scheduler(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch, **rising)

    def scaling(self, batches: Iterable[Tensor]) -> nn.Module:
        """The input scaling, fitted on raw batches (N, C, H, W) of the training split."""
        with named("scaling"):
            return self.make_scaling(batches)


def _rate(node: Mapping[str, Any]) -> Any:
    if "lr" not in node:
        raise InputError(
            "optimizer.lr is missing: every update rule needs a learning rate, for example optimizer.lr=0.1"
        )
    return node["lr"]


def check_partial(slot: str, node: Mapping[str, Any]) -> None:
    """InputError unless the node of a slot, or of the model, makes what is called later just where that is wanted."""
    later = slot in _LATER
    if bool(node.get("_partial_")) != later:
        why = "it is given its model, weights or data later" if later else "it is built as it is"
        raise InputError(f"{slot}._partial_ must be {str(later).lower()}: {why}")


def _build(slot: str, node: dict[str, Any]) -> Any:
    check_partial(slot, node)
    with named(slot):
        return instantiate(node)

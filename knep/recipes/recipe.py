"""A recipe: one choice per slot, together, for any `nn.Module`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from knep.config.catalog import SLOTS as SLOTS  # the order in which they act
from knep.config.external_app import resolved, slot_node
from knep.config.instantiate import instantiate
from knep.errors import InputError, named
from knep.optim.batch_law import scaled
from knep.optim.own_loop import EmaAverage, ModelAverage, NoAverage, SoupAverage, Stopper, SwaAverage
from knep.optim.param_groups import decayed, param_groups, rate
from knep.optim.sparse_complex import odd_weights, refuse_clip, refuse_step
from knep.optim.thawing import Layers, Strategy, Tuning, layers_of
from knep.optim.wrap import wrapped, wraps_of
from knep.recipes import averaging, finetune
from knep.recipes.regularization import Regularizer
from knep.surgery.check_forward import as_inputs, probed
from knep.surgery.edit import Change, bare, copied, unwrapped
from knep.surgery.insert_module import inserted
from knep.surgery.sample import Inputs
from knep.utils.monitors import mode_of, of_other_split

if TYPE_CHECKING:
    from typing_extensions import Self

MODEL_SLOTS = ("norm", "activation", "dropout", "init")
# Slots whose options are functions still to be called.
_LATER = (*MODEL_SLOTS, "model", "scaling", "optimizer", "clip", "scheduler", "loss", "sampling", "task", "finetune")
# Keys of a slot's node that say how the training loop uses the trick; the trick itself never sees them.
_BESIDE = ("accumulate", "wrap", "interval", "monitor")


@dataclass(frozen=True)
class Report:
    """What a recipe did to a model: slot -> the edits, layer by layer; and the model that has them."""

    changes: Mapping[str, list[Change]]
    model: nn.Module

    def __str__(self) -> str:
        lines = [f"{slot:10} {c.path}: {c.before} -> {c.after}" for slot, cs in self.changes.items() for c in cs]
        rewritten = [path or "the model" for path, m in self.model.named_modules() if inserted(m)]
        if rewritten:
            lines.append(f"not for torch.jit.script, which does not read what was put into: {', '.join(rewritten)}")
        return "\n".join(lines)


@dataclass
class Recipe:
    """The slots of one recipe, instantiated: from `knep.load` or `from_config`. Every part is usable alone.

    lr, weight_decay: of the optimizer; layer_decay: factor on lr per layer below the head; accumulate: micro-batches
    per optimizer step, or "epoch"; max_epochs: how long the recipe trains, None where it does not say.
    clip: edits the gradients of `recipe.clip(model.parameters())` in place, returns their norm before that.
    wrap: what stands around the optimizer's step, in this order: centralize, cautious, lookahead (`knep.optim.wrap`).
    loss: an option of `knep.recipes.loss`, None where the config has none; see `knep.recipes.loss.bound`.
    finetune: an option of `knep.recipes.finetune`, which `tuning` carries out.
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
    accumulate: int | str | Mapping[int, int] = 1
    max_epochs: int | None = None
    schedule_at: dict[str, str] = field(default_factory=lambda: {"interval": "step"})
    loss: Any = None
    wrap: list[Any] = field(default_factory=list)
    finetune: Callable[[Layers], Strategy] = finetune.none

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Self:
        """From a composed config with one node per slot: one of knep's own, or the DictConfig of another Hydra app.

        A slot that the config leaves out is `none`; the optimizer must be there. A DictConfig is resolved, and checked
        for options that contradict each other, which knep's own configs were already.
        Raises InputError naming the slot that cannot be built.
        """
        if isinstance(cfg, DictConfig):
            cfg = resolved(cfg, (*SLOTS, "loss", "finetune"))
        nodes = {slot: slot_node(cfg, slot) for slot in SLOTS}
        nodes["optimizer"] = scaled(nodes["optimizer"], cfg)
        beside = {slot: {k: nodes[slot].pop(k) for k in _BESIDE if k in nodes[slot]} for slot in ("optimizer",)}
        at = {k: nodes["scheduler"].pop(k) for k in ("interval", "monitor") if k in nodes["scheduler"]}
        wrap = beside["optimizer"].get("wrap") or []
        wraps_of(wrap)
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
            loss=_build("loss", dict(cfg["loss"])) if cfg.get("loss") is not None else None,
            wrap=list(wrap),
            finetune=_build("finetune", dict(cfg["finetune"])) if cfg.get("finetune") is not None else finetune.none,
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
        return {slot: monitor for slot, monitor in found.items() if monitor and not of_other_split(monitor)}

    def apply(
        self,
        model: nn.Module,
        sample: Inputs | None = None,
        *,
        inplace: bool = True,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> Report:
        """Norm, activation, dropout and init, in this order: edits `model` itself, or with inplace=False a copy of it.

        sample: a scaled batch as the model takes it, for the tricks that look at the data and to see that the model
        runs: a tensor, images (N, C, H, W) or any other; a tuple of positional arguments, a dict of keyword arguments,
        a list. It is brought to the model's device and, but for whole numbers, its dtype.
        forward: runs the model on the sample, `forward(model, sample)`, where the model's own call is another.
        The changed model is `report.model`.
        Raises NoEffectError where a chosen trick found nothing to change, InputError for a model that fails on the
        sample, naming the layer, or that cannot be copied.
        """
        target = bare(model) if inplace else bare(copied(model))
        sample = as_inputs(target, sample, forward)
        if sample is not None:
            sample = probed(target, sample)
        changes = {}
        for slot, trick in self.model_slots.items():
            with named(slot):
                changes[slot] = trick(target, sample=sample)
        return Report(changes, model if inplace else target)

    def tuning(
        self,
        model: nn.Module,
        new: Collection[str] | None = None,
        sample: Inputs | None = None,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> Tuning | None:
        """What `finetune` does to a model whose weights were loaded; None for finetune=none.

        In a loop of one's own: `tuning = recipe.tuning(model)`, `recipe.optimizer(model, tuning=tuning)`, and
        `tuning.at(model, epoch)` at the start of each epoch, behind `model.train()`.

        new: names of the parameters that were not loaded, which are the head; without them it is the output layer, the
        deepest. sample, forward: as for `apply`, to measure depth. Raises InputError as the strategy does.
        """
        if getattr(self.finetune, "func", self.finetune) is finetune.none:
            return None
        model = unwrapped(model)
        with named("finetune"):
            layers = layers_of(model, new, as_inputs(model, sample, forward))
            tuning = Tuning(self.finetune(layers), layers)
        tuning.freeze(model)
        return tuning

    def optimizer(
        self,
        model: nn.Module,
        sample: Inputs | None = None,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        tuning: Tuning | None = None,
    ) -> torch.optim.Optimizer:
        """The optimizer over the model's parameter groups: no decay on norms and biases, layer-wise rates.

        model: compiled, or wrapped for several devices, it is the model inside whose parameters are meant.
        sample, forward: as for `apply`; with a sample, layer-wise rates follow the order in which layers act on it.
        tuning: as `tuning` gives it; without one it is made here, from the model's output layer as the head. What
        thaws in later epochs has its group from the start.
        """
        traced = sample is not None and self.layer_decay < 1
        model = unwrapped(model)
        tuning = self.tuning(model, None, sample, forward=forward) if tuning is None else tuning
        extra: dict[str, Any] = {"sample": as_inputs(model, sample, forward)} if traced else {}
        extra |= {} if tuning is None else {"factors": tuning.factors(self.lr)}
        self.refuse_clip(model)
        with named("optimizer"):
            groups = param_groups(
                model, lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay, **extra
            )
            return wrapped(self._taking_all(model)(groups), self.wrap)

    def _taking_all(self, model: nn.Module) -> Callable[..., torch.optim.Optimizer]:
        """The update rule, in a form that takes sparse and complex gradients where the model has such."""
        make = self.make_optimizer
        option = _name(make)
        for kind, weight in odd_weights(model).items():
            if getattr(make, "keywords", {}).get("fused"):
                print(f"knep: optimizer.fused=false, for the {kind} gradients of {weight}", file=sys.stderr)
                make = partial(make, fused=False)
            rule = make

            def of(small: nn.Module, rule: Callable[..., torch.optim.Optimizer] = rule) -> torch.optim.Optimizer:
                return wrapped(rule(param_groups(small, lr=self.lr, weight_decay=self.weight_decay)), self.wrap)

            refuse_step(kind, weight, of, option)
        return make

    def refuse_clip(self, model: nn.Module) -> None:
        """Raises InputError where `clip` cannot edit the gradients of a weight: sparse or complex ones."""
        for kind, weight in odd_weights(model).items():
            refuse_clip(kind, weight, self.clip, _name(self.clip))

    def optimizer_of(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of these groups, which are those of `param_groups`, with what is wrapped around its step."""
        return wrapped(self.make_optimizer(groups), self.wrap)

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

    def penalty(self, model: nn.Module) -> Tensor | float:
        """What the regularization adds to the loss of a loop of one's own: 0-dim, or 0.0."""
        return self.regularization.penalty(decayed(model))

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """What the regularization does to the weights behind `optimizer.step()` in a loop of one's own."""
        with torch.no_grad():
            self.regularization.after_step(decayed(model), rate(optimizer))

    def average(self, model: nn.Module, updates: int | None = None) -> ModelAverage:
        """The recipe's averaging for a loop of one's own: `update()` after each step, `with average.swapped():`.

        updates: how many there will be, of which averaging=swa leaves out the first; None takes each.
        Raises InputError for averaging=ensemble, which trains several models, and for several decays or a greedy soup,
        which choose by validations of their own.
        """
        made = self.averaging
        if isinstance(made, averaging.Ema):
            if made.several:
                raise InputError(
                    f"averaging.decay={made.decays} chooses by validations: give one, averaging.decay=0.999"
                )
            return EmaAverage(model, made.decays[0], made.warmup)
        if isinstance(made, averaging.Swa):
            return SwaAverage(model, made.start, updates)
        if isinstance(made, averaging.GreedySoup):
            raise InputError("averaging=greedy_soup validates mixtures, which a loop of one's own does: take soup")
        if isinstance(made, averaging.Soup):
            return SoupAverage(model, made.k, made.mode)
        if self.members > 1:
            raise InputError(f"averaging=ensemble trains {self.members} models: run the loop once for each")
        return NoAverage(model)

    def stopper(self) -> Stopper:
        """The recipe's stopping for a loop of one's own: `if stopper.update(metric): break`; "none" never stops."""
        made = self.stopping
        if not isinstance(made, EarlyStopping):
            return Stopper()
        return Stopper(made.patience, abs(made.min_delta), made.mode)

    def scaling(self, batches: Iterable[Tensor]) -> nn.Module:
        """The input scaling, fitted on raw batches (N, C, H, W) of the training split."""
        with named("scaling"):
            return self.make_scaling(batches)


def _name(made: Any) -> str:
    return getattr(getattr(made, "func", made), "__name__", "").lower()


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

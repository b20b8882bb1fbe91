"""A recipe at work: what it would do to a model, the module that trains by it, and a Trainer with its parts."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from knep.config.command_line.vocabulary import line_for
from knep.engine.loops.accumulation import MeanOverWindow
from knep.engine.module import Classifier
from knep.errors import InputError
from knep.recipes.dry_run import Plan, plan
from knep.recipes.recipe import Recipe as Slots
from knep.recipes.scaling import none as raw_pixels
from knep.utils.monitors import logged, refuse_unlogged

_TIPS = ("💡", "Loading `train_dataloader` to estimate")


class Recipe(Slots):
    """A recipe as `knep.load` gives it: its slots, with Lightning's Trainer and module, and a dry run."""

    def dry_run(self, model: nn.Module, sample: Tensor | None = None) -> Plan:
        """Prints what `apply` and `optimizer` would do, as a table, and returns it; the model stays as it is.

        sample: as for `apply`. Raises InputError where the model cannot be copied, or fails on the sample.
        """
        made = plan(self, model, sample)
        print(made)
        return made

    def lightning(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        images: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]] | None = None,
        seed: int = 0,
    ) -> Classifier:
        """A LightningModule that trains `model` as it is; call `apply` first. For any DataLoader or datamodule.

        num_classes: width of the model's scores; images: raw training batches, x (N, C, H, W) in 0..255 or (x, y), on
        which the recipe's scaling is fitted, to act in the model's module; without them batches must come scaled, and a
        warning says so.
        """
        if images is None:
            scaling = None
            if getattr(self.make_scaling, "func", None) is not raw_pixels:
                warnings.warn(
                    "the recipe's scaling is left to your loader: give images=<raw training batches> to fit it here",
                    stacklevel=2,
                )
        else:
            scaling = self.scaling(x if isinstance(x, Tensor) else x[0] for x in images)
        return Classifier(model, self, num_classes=num_classes, scaling=scaling, seed=seed)

    def trainer(self, max_epochs: int | None = None, **trainer_kwargs: Any) -> Trainer:
        """Lightning's Trainer with the recipe's averaging, stopping and accumulation; clipping is in `lightning`.

        max_epochs: without it, the recipe's own. trainer_kwargs: any of lightning.pytorch.Trainer; they win.
        Stopping restores the weights of the best epoch, which it needs checkpoints for.
        Raises InputError for what contradicts the recipe.
        """
        return build_trainer(self, max_epochs, trainer_kwargs)


class _Watched(Callback):
    """Refuses to fit where nobody logs the metric that a slot watches, or without validation data."""

    def __init__(self, slot: str, monitor: str) -> None:
        self._slot, self._monitor = slot, monitor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._slot == "scheduler" and not isinstance(pl_module, Classifier):
            return  # a module of one's own has schedules of its own
        if not trainer.enable_validation:
            what = "stops" if self._slot == "stopping" else f"chooses its {self._slot}"
            raise InputError(
                f"the recipe {what} by {self._monitor}, and fit got no validation data: give val_dataloaders, or load "
                f"the recipe with {self._slot}=none"
            )
        if type(pl_module) is Classifier:
            refuse_unlogged({self._slot: {"monitor": self._monitor}})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._slot != "scheduler" and trainer.callback_metrics:
            logged(trainer, self._monitor)


def build_trainer(recipe: Slots, max_epochs: int | None, options: Mapping[str, Any]) -> Trainer:
    """As `Recipe.trainer` says; `options` are keywords of lightning.pytorch.Trainer."""
    _refuse_unknown(options)
    _refuse(recipe, options)
    epochs = max_epochs if max_epochs is not None else recipe.max_epochs
    if epochs is None and not {"max_steps", "max_time"} & set(options):
        raise InputError("this recipe does not say how long to train: write recipe.trainer(max_epochs=10)")
    own = options.get("callbacks") or []
    # A trainer gets callbacks of its own, so that a second one starts anew.
    callbacks = [*copy.deepcopy([recipe.averaging, recipe.stopping]), *(own if isinstance(own, list) else [own])]
    callbacks.insert(0, MeanOverWindow())
    callbacks[:0] = [_Watched(slot, monitor) for slot, monitor in recipe.watched.items()]
    monitor = recipe.watched.get("stopping")
    if monitor is not None:
        mode = getattr(recipe.stopping, "mode", "min")
        callbacks.append(ModelCheckpoint(filename="best", monitor=monitor, mode=mode))
    rest = {"accumulate_grad_batches": recipe.accumulate} | dict(options)
    hush_tips()
    return Trainer(**{**rest, "max_epochs": epochs, "callbacks": callbacks})


def hush_tips() -> None:
    """Leaves out what Lightning advertises, and what it says of its own code; its log goes on."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(_TIPS)


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    known = [name for name in signature(Trainer.__init__).parameters if name != "self"]
    for name, value in options.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            said = f"did you mean {near[0]}?" if near else line_for(f"trainer.{name}", str(value)) or ", ".join(known)
            raise InputError(f"trainer({name}=...) is no keyword of lightning.pytorch.Trainer: {said}")


def _refuse(recipe: Slots, options: Mapping[str, Any]) -> None:
    if options.get("gradient_clip_val") is not None:
        raise InputError(
            "trainer(gradient_clip_val=...) would do nothing, because the recipe clips: load it with clip=norm "
            f"clip.theta={options['gradient_clip_val']}"
        )
    if options.get("gradient_clip_algorithm") is not None:
        raise InputError(
            "trainer(gradient_clip_algorithm=...) would do nothing, because the recipe clips: load it with clip=norm, "
            "clip=value or clip=adaptive"
        )
    if recipe.members > 1:
        raise InputError(
            f"averaging=ensemble trains {recipe.members} models, and a Trainer one: load the recipe with "
            "averaging=none and fit a model per seed, or use knep train"
        )
    if recipe.accumulate == "epoch" and "accumulate_grad_batches" not in options:
        raise InputError(
            "the recipe takes one step an epoch, and the Trainer needs the number: write "
            "recipe.trainer(accumulate_grad_batches=len(train_loader))"
        )
    if options.get("enable_checkpointing") is False and hasattr(recipe.stopping, "monitor"):
        raise InputError(
            "trainer(enable_checkpointing=False) leaves no best weights to go back to: leave it out, or load the "
            "recipe with stopping=none"
        )

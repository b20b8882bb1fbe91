"""Lightning's Trainer with the parts of a recipe that are its: averaging, stopping, accumulation, the best weights."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from knep.config.command_line.vocabulary import line_for
from knep.engine.loops.accumulation import MeanOverWindow
from knep.engine.module import Classifier
from knep.errors import InputError
from knep.utils.monitors import logged, refuse_unlogged

if TYPE_CHECKING:
    from knep.recipes.recipe import Recipe


_TIPS = ("💡", "Loading `train_dataloader` to estimate")


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


def build_trainer(recipe: Recipe, max_epochs: int | None, options: Mapping[str, Any]) -> Trainer:
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


def _refuse(recipe: Recipe, options: Mapping[str, Any]) -> None:
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

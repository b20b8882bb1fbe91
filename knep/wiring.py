"""Lightning's Trainer with the parts of a recipe that are its: averaging, stopping, accumulation, the best weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from knep.errors import InputError
from knep.words import line_for

if TYPE_CHECKING:
    from knep.recipe import Recipe


class _Validated(Callback):
    """Refuses to fit without validation data where the recipe stops by it."""

    def __init__(self, monitor: str) -> None:
        self._monitor = monitor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            raise InputError(
                f"the recipe stops by {self._monitor}, and fit got no validation data: give val_dataloaders, or load "
                "the recipe with stopping=none"
            )


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
    monitor = getattr(recipe.stopping, "monitor", None)
    if monitor is not None:
        mode = getattr(recipe.stopping, "mode", "min")
        callbacks += [_Validated(monitor), ModelCheckpoint(filename="best", monitor=monitor, mode=mode)]
    rest = {"accumulate_grad_batches": recipe.accumulate} | dict(options)
    return Trainer(**{**rest, "max_epochs": epochs, "callbacks": callbacks})


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

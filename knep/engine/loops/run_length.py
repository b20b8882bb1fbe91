"""How long a fit is, in optimizer steps: what schedules follow."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from knep.errors import InputError
from knep.optim.schedules import Unchanged
from knep.recipes import scheduler
from knep.recipes.recipe import Recipe
from knep.utils.batch_plan import length_of, plan_in

_BY_EPOCHS = (scheduler.exponential, scheduler.step, scheduler.multistep)


def run_length(trainer: Trainer, recipe: Recipe, optimizers: int = 1) -> tuple[int, int]:
    """Optimizer steps of the run and of an epoch, for each of its optimizers.

    A module that optimizes by hand is taken to step each once a batch, but where max_steps, which counts those of all,
    says how many there are. Raises InputError where a schedule needs what nobody knows.
    """
    module = trainer.lightning_module
    by_hand = module is not None and not module.automatic_optimization
    every: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    trainer.fit_loop.setup_data()  # the number of batches is unknown before it where only steps are limited
    total = length_of(trainer)[0]
    if trainer.max_steps > 0 and (by_hand or every):
        total = max(1, trainer.max_steps // (optimizers if by_hand else 1))
    batches = trainer.num_training_batches
    endless, unknown = not 0 < total < math.inf, batches == math.inf
    schedule = recipe.scheduler(_placeholder(), 1, 1)
    if not isinstance(schedule, (Unchanged, ReduceLROnPlateau)):
        by_epochs = getattr(recipe.make_scheduler, "func", recipe.make_scheduler) in _BY_EPOCHS
        if unknown and (endless or by_epochs):
            limits = "limit_train_batches=N" if by_epochs else "limit_train_batches=N or max_steps=N"
            raise InputError(
                "the schedule needs the length of the run, and the training loader does not say how many batches it "
                f"has: give the Trainer {limits}, or load the recipe with scheduler=none"
            )
        if every and (trainer.max_steps < 1 or by_epochs):
            raise InputError(
                f"the schedule needs the length of {'an epoch' if by_epochs else 'the run'}, and "
                f"reload_dataloaders_every_n_epochs={every} may change it: "
                + ("" if by_epochs else "give the Trainer max_steps=N, or ")
                + "load the recipe with scheduler=none"
            )
        if len(set(plan_in(trainer).values())) > 1 and by_epochs:
            raise InputError(
                "the schedule counts epochs of as many steps, and accumulate by epoch or a "
                "GradientAccumulationScheduler changes how many they have: write one number, or scheduler=cosine"
            )
        if endless:
            raise InputError("the schedule needs the length of the run: give the Trainer max_epochs or max_steps")
    per_epoch = 1 if unknown else max(1, -(-int(batches) // plan_in(trainer)[0]))
    return 1 if endless else int(total), per_epoch


def _placeholder() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(())], lr=1.0)

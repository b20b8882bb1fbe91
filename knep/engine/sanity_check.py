"""Trying a config's tricks on a toy before anything is made: a constructor's complaint becomes one line in time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from knep.config.budget import check_config
from knep.config.instantiate import instantiate
from knep.config.schema import Node, RunConfig
from knep.data.base import refuse_loaders
from knep.engine.trainer import build_callbacks
from knep.errors import InputError, named
from knep.models.user_model import find, imported
from knep.recipes.recipe import Recipe, check_partial


def _toy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def rehearse(run: RunConfig) -> None:
    """Builds every slot and runs it on a toy of two layers. Raises InputError naming the slot and its complaint."""
    check_config(run.plain)
    with torch.random.fork_rng(devices=[]):
        recipe = Recipe.from_config(run.plain)
        with named("data"):
            refuse_loaders(instantiate(run.data))
        for part, node in {"guard": run.guard, "doctor": run.doctor}.items():  # what watches a training
            if node is not None:
                check_partial(part, node)
                with named(part):
                    instantiate(node)
        build_callbacks(run.callbacks)
        check_partial("model", run.model)
        with named("model"):
            _find_model(run.model)
        for slot, trick in recipe.model_slots.items():
            _try_values(slot, trick)
        recipe.scaling([torch.zeros(1, 1, 2, 2, dtype=torch.uint8)])
        toy = _toy()
        recipe.scheduler(recipe.optimizer(toy), total_steps=100, steps_per_epoch=10)
        toy(torch.ones(2, 4)).sum().backward()
        with named("clip"):
            recipe.clip(list(toy.parameters()))


def _find_model(node: Node) -> None:
    """A model of another project is looked up; it is built when the shape of the images is known."""
    builder = instantiate(node)
    if getattr(builder, "func", None) is imported:
        find(builder.keywords["path"])


def _try_values(slot: str, trick: Any) -> None:
    try:
        trick(_toy(), sample=torch.zeros(2, 4))
    except InputError:
        pass  # a toy lacks what some tricks need; only a complaint about a value counts here
    except (ValueError, TypeError) as error:
        raise InputError(f"{slot}: {' '.join(str(error).split())}") from error

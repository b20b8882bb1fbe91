"""Trying a config's tricks on a toy before anything is made: a constructor's complaint becomes one line in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from knep.config.budget import check_config
from knep.config.instantiate import instantiate
from knep.config.schema import DataSpec, Node, RunConfig
from knep.data.base import refuse_loaders
from knep.data.own.imported import Imported
from knep.engine.build import build_task
from knep.engine.trainer import build_callbacks
from knep.errors import InputError, named
from knep.models.user_model import find, imported
from knep.optim.thawing import layers_of
from knep.recipes import finetune
from knep.recipes.loss import wants_counts
from knep.recipes.recipe import Recipe, check_partial
from knep.tasks.metrics import higher_is_better
from knep.utils.monitors import check_directions


def _toy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def rehearse(run: RunConfig) -> None:
    """Builds every slot and runs it on a toy of two layers. Raises InputError naming the slot and its complaint."""
    check_config(run.plain)
    with torch.random.fork_rng(devices=[]):
        recipe = Recipe.from_config(run.plain)
        with named("data"):
            data = instantiate(run.data)
            refuse_loaders(data)
            if isinstance(data, Imported):
                data.find()
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
        _try_task(run, recipe)
        _try_finetune(recipe)
        toy = _toy()
        recipe.finetune = finetune.none  # a toy has no parameters of the names that it may freeze
        recipe.scheduler(recipe.optimizer(toy), total_steps=100, steps_per_epoch=10)
        toy(torch.ones(2, 4)).sum().backward()
        with named("clip"):
            recipe.clip(list(toy.parameters()))


def _try_finetune(recipe: Recipe) -> None:
    """Whether the values of the strategy are in their ranges; its patterns are of the model's names."""
    given = getattr(recipe.finetune, "keywords", {})
    with named("finetune"):
        recipe.finetune(layers_of(_toy()), **({"freeze": ()} if "freeze" in given else {}))


def _try_task(run: RunConfig, recipe: Recipe) -> None:
    """Builds the task, whose metrics refuse a name that is none, and lets its loss look at a toy's scores."""
    for part, node in {"task": run.task, "loss": run.loss, "sampling": run.sampling}.items():
        if node is not None:
            check_partial(part, node)
            with named(part):
                instantiate(node)
    labels = run.task_name == "multilabel"
    counts = tuple([[1.0] * _WIDTH] * 2 if labels else [1.0] * (2 if run.task_name == "binary" else _WIDTH))
    spec = DataSpec(_WIDTH, 1, 1, tuple("abcdef"), counts=counts if wants_counts(recipe.loss) else None)
    task: Any = build_task(run, spec, recipe)
    check_directions(run.plain, higher_is_better(task.metrics()))
    if run.task_name in _TOYS:
        with named("loss"):
            task.loss(*_TOYS[run.task_name]())


def _words() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 3, _WIDTH), torch.ones(2, 3, dtype=torch.long)


_WIDTH = 6  # more than the five that some metrics ask for
# Scores and targets of each task.
_TOYS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "multiclass": lambda: (torch.zeros(2, _WIDTH), torch.ones(2, dtype=torch.long)),
    "binary": lambda: (torch.zeros(2), torch.ones(2)),
    "multilabel": lambda: (torch.zeros(2, _WIDTH), torch.ones(2, _WIDTH)),
    "regression": lambda: (torch.zeros(2, _WIDTH), torch.ones(2, _WIDTH)),
    "segmentation": lambda: (torch.zeros(2, _WIDTH, 2, 2), torch.ones(2, 2, 2, dtype=torch.long)),
    "tokens": _words,
    "tagging": _words,
}


def _find_model(node: Node) -> None:
    """A model of another project is looked up; it is built when the shape of the images is known."""
    builder = instantiate(node)
    if getattr(builder, "func", None) is imported:
        find(builder.keywords["path"])


def _try_values(slot: str, trick: Callable[..., object]) -> None:
    try:
        trick(_toy(), sample=torch.zeros(2, 4))
    except InputError:
        pass  # a toy lacks what some tricks need; only a complaint about a value counts here
    except (ValueError, TypeError) as error:
        raise InputError(f"{slot}: {' '.join(str(error).split())}") from error

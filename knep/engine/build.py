"""Building one model and fitting it: the part of a run that Lightning does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from knep.config.budget import check_room, layers_counted
from knep.config.instantiate import instantiate
from knep.config.schema import DataSpec, RunConfig
from knep.data.base import Images
from knep.engine.module import Classifier
from knep.errors import InputError, named
from knep.recipes.recipe import Recipe


def build_module(
    run: RunConfig, spec: DataSpec, data: Images | None = None, initialise: bool = True, seed: int = 0
) -> Classifier:
    """The Classifier that a run describes: scaling fitted on `data`, model built, recipe applied.

    spec: of the data, which a checkpoint is rebuilt without; initialise: False leaves out `init` and the scaling's
    statistics, for weights that come from a checkpoint.
    """
    recipe = Recipe.from_config(run.plain)
    if not initialise:
        recipe.model_slots = {k: v for k, v in recipe.model_slots.items() if k != "init"}
    torch.manual_seed(seed)
    shape = (1, spec.channels, spec.image_size, spec.image_size)
    images = data.train_images() if data is not None else [torch.zeros(shape, dtype=torch.uint8)]
    scaling = recipe.scaling(images)
    with named("model"):
        check_model(run.model, spec.size, members=run.members if data is not None else 1)
        model = instantiate(run.model)(**spec.size)
    raw = data.sample(64) if data is not None else torch.zeros(shape, dtype=torch.uint8)
    recipe.apply(model, sample=scaling(raw))
    if run.runtime.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Classifier(
        model,
        recipe,
        num_classes=spec.num_classes,
        scaling=scaling,
        seed=seed,
        log_every=run.runtime.log_every,
        channels_last=run.runtime.channels_last,
        about=run.facts(spec),
        guard=instantiate(run.guard) if run.guard is not None else None,
    )


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Runs with `count` CPU threads; None leaves torch's choice."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


_LARGEST = 10**7  # width or number of layers


def check_model(node: Mapping[str, Any], shape: Mapping[str, int], most: int | None = None, members: int = 1) -> None:
    """Counts the parameters of one of knep's own models without memory for them, on torch's meta device.

    shape: in_channels, num_classes and image_size; most: how many there may be, None for what the machine can train;
    members: models of this kind that are trained at once.
    Raises InputError for a model that is too large. Models of other projects are as large as their builders make them.
    """
    target = str(node["_target_"])
    if not target.startswith("knep.models.") or "imported" in target:
        return
    for key, value in node.items():
        if isinstance(value, int) and value > _LARGEST:
            raise InputError(f"model.{key}={value} is no size of a layer: write at most {_LARGEST:,}")
    try:
        with torch.device("meta"), layers_counted("the model"):
            count = sum(p.numel() for p in instantiate(node)(**shape).parameters())
    except RuntimeError as error:  # a size that overflows
        raise InputError(f"a layer is too large ({str(error).splitlines()[0][:80]}): write smaller numbers") from error
    except TypeError as error:  # a keyword that it lacks, or a value of another kind
        raise InputError(f"{target} cannot be built ({str(error)[:120]}): change the values of model") from error
    if most is not None and count > most:
        raise InputError(f"its config builds {count:,} parameters, and it holds {most:,}")
    check_room(8 * count * members, "the model's weights and gradients need", "write smaller widths")

"""`knep.callbacks`: a recipe for the Trainer of anybody's LightningModule."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback

from knep.config.compose import compose_recipe
from knep.engine.any_module.best import Best
from knep.engine.any_module.callback import RecipeCallback
from knep.engine.any_module.effects import effects
from knep.engine.any_module.monitors import Monitors
from knep.engine.any_module.part import Part
from knep.engine.loops.accumulation import MeanOverWindow
from knep.errors import InputError
from knep.recipes.averaging import Soup, WeightAverage
from knep.recipes.loss import auto
from knep.recipes.recipe import Recipe
from knep.tasks.batches import Reading

_TIPS = ("💡", "Loading `train_dataloader` to estimate")

Named = str | Recipe | Sequence[Any]  # a name, a recipe, or [name, [overrides]]


class Callbacks(list[Callback]):
    """Callbacks for a Trainer, in their order."""

    def effects(self) -> dict[str, str]:
        """Slot -> what it did in the fits so far, in words and numbers; "none" where the recipe has nothing there."""
        return effects(self)


def callbacks(
    recipe: Named | None = None,
    overrides: Sequence[str] = (),
    *,
    model: str | Mapping[str, Named] | None = None,
    sample: object = None,
    forward: Callable[..., Any] | None = None,
    batch: Sequence[str | int] | Callable[[Any], tuple[Any, Any]] | None = None,
    num_classes: int | None = None,
    search: Sequence[str] = (),
) -> Callbacks:
    """A recipe on any LightningModule: `L.Trainer(callbacks=knep.callbacks("modern", ["norm=group"], model="net"))`.

    recipe, overrides, search: as for `knep.load`, or a recipe that it gave. model: the attribute that holds the
    network, "" for the module itself, None for the only one with parameters; or, under manual optimization, a recipe
    for each network, {"generator": "modern", "discriminator": ["none", ["optimizer=adam"]]}, in the order in which the
    module takes its optimizers. sample: a batch of inputs, or one as the loader gives it, for tricks that look at data;
    forward: `forward(network, sample)`, where the network is not called with the sample alone. batch: the keys of input
    and target, for augment and scaling, where they are none of the usual; num_classes: for augment=mixup and cutmix.

    Model slots act before the first step, optimizer, schedule and clip take the place of the module's own, which stay
    with optimizer=none and clip=none. Raises InputError, here or before the first step, for what cannot act.
    """
    parts = _parts(recipe, overrides, model, search)
    for part in parts:
        if part.recipe.members > 1:
            raise InputError(
                f"averaging=ensemble trains {part.recipe.members} models, and a Trainer one: load the recipe with "
                "averaging=none and fit a model per seed, or use knep train"
            )
        if part.recipe.loss is not None and getattr(part.recipe.loss, "func", part.recipe.loss) is not auto:
            name = getattr(getattr(part.recipe.loss, "func", None), "__name__", "...")
            raise InputError(
                f"loss={name} acts in knep.LitModule, and a module of yours computes its own loss: load the recipe "
                f"with loss=auto, and take knep.recipes.loss.{name} there"
            )
    main = RecipeCallback(parts, sample=sample, forward=forward, reading=Reading(batch), num_classes=num_classes)
    averaging, stopping = _own(parts, "averaging"), _own(parts, "stopping")
    averaging.deferred = isinstance(averaging, WeightAverage)
    main.averaging = averaging
    monitor = getattr(stopping, "monitor", None)
    best = [Best(monitor, stopping.mode)] if monitor else []
    watched = {slot: metric for part in parts for slot, metric in part.recipe.watched.items()}
    watch = Monitors(watched, [averaging, stopping, *best])
    hush_tips()
    return Callbacks([watch, MeanOverWindow(), main, averaging, stopping, *best])


def _parts(
    recipe: Named | None, overrides: Sequence[str], model: str | Mapping[str, Named] | None, search: Sequence[str]
) -> list[Part]:
    if not isinstance(model, Mapping):
        if recipe is None:
            raise InputError('knep.callbacks() needs a recipe: knep.callbacks("modern"), for example')
        return [Part(model, _loaded(recipe, overrides, search))]
    if recipe is not None or overrides:
        raise InputError("model={...} has a recipe for each network: leave the first argument out")
    if not model:
        raise InputError('model={} names no network: write model={"generator": "modern", "discriminator": "modern"}')
    return [Part(path, _loaded(named, (), search)) for path, named in model.items()]


def _loaded(recipe: Named, overrides: Sequence[str], search: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides:
            raise InputError("a recipe that is loaded already takes no overrides: give them to knep.load")
        return copy.deepcopy(recipe)  # so that a second fit's averages start anew
    if isinstance(recipe, str):
        return Recipe.from_config(compose_recipe(recipe, list(overrides), list(search)))
    if len(recipe) == 2 and isinstance(recipe[0], str) and not isinstance(recipe[1], str):
        return Recipe.from_config(compose_recipe(recipe[0], list(recipe[1]), list(search)))
    raise InputError(
        f'{recipe!r} is no recipe: write a name, or a name with its overrides, ["none", ["optimizer=adam"]]'
    )


def _own(parts: Sequence[Part], slot: str) -> Any:
    """The option of a slot that acts on the whole module."""
    found = [getattr(part.recipe, slot) for part in parts]
    acting = [made for made in found if isinstance(made, (WeightAverage, Soup)) or getattr(made, "monitor", None)]
    if len(acting) > 1:
        raise InputError(f"{slot} acts on the whole module: choose it in one of the recipes, and {slot}=none elsewhere")
    return acting[0] if acting else found[0]


def hush_tips() -> None:
    """Leaves out what Lightning advertises, and what it says of its own code; its log goes on."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(_TIPS)

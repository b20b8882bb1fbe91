"""knep: training tricks as recipes, for any `nn.Module`, each one Hydra override and backed by a measured number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from knep import doctor as doctor  # which imports nothing itself
from knep.version import __version__ as __version__

if TYPE_CHECKING:
    from knep import ensemble as ensemble
    from knep.engine.any_module.callbacks import callbacks as callbacks
    from knep.engine.any_module.lit_module import LitModule as LitModule
    from knep.engine.apply_recipe import Recipe
    from knep.errors import InputError as InputError
    from knep.tasks.smoothed import Smoothed as smoothed

__all__ = ["InputError", "LitModule", "__version__", "allow", "callbacks", "load", "smoothed"]

# What brings torch comes at its first use.
_LATER = {
    "InputError": ("knep.errors", "InputError"),
    "LitModule": ("knep.engine.any_module.lit_module", "LitModule"),
    "callbacks": ("knep.engine.any_module.callbacks", "callbacks"),
    "ensemble": ("knep.ensemble", None),
    "smoothed": ("knep.tasks.smoothed", "Smoothed"),
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'knep' has no attribute '{name}'")
    from importlib import import_module

    path, member = _LATER[name]
    module = import_module(path)
    return module if member is None else getattr(module, member)


def load(name: str, overrides: Sequence[str] = (), *, search: Sequence[str] = ()) -> Recipe:
    """A named recipe for a model of your own: `knep.load("modern", ["norm=group", "optimizer.lr=3e-3"])`.

    name: as `knep ls recipe` lists them, or a YAML of your own in a folder of `search`; overrides: lines as on the
    command line, for the slots and their values; search: folders of your own configs, "file:///home/me/conf" or
    "pkg://mypkg.conf", where a name means yours before it means knep's.
    Classes of your own that the overrides name outright, or that `allow_targets=[mypkg.]` covers, are allowed.
    Raises InputError for what is misspelt, out of range or contradictory, naming it and the nearest name.
    """
    # Imported here, so that `import knep` costs nothing: torch alone takes seconds.
    from knep.config.compose import compose_recipe
    from knep.engine.apply_recipe import Recipe

    return Recipe.from_config(compose_recipe(name, overrides, search))


def allow(prefix: str) -> None:
    """Lets configs instantiate targets under `prefix`, for example "mypkg."; as `knep.config.instantiate.allow`."""
    from knep.config.instantiate import allow as allow_prefix

    allow_prefix(prefix)

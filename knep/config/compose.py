"""From override lines to a checked config: every mistake is found here, before a folder is made or a step is run."""

from __future__ import annotations

import difflib
import functools
import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf
from hydra.conf import HydraConf, JobConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from knep.config.catalog import GROUPS, options
from knep.config.command_line.aliases import PATHS, readable, tell, to_type, untold
from knep.config.command_line.readers import no_key, refuse_unloaded, refuse_unread
from knep.config.command_line.vocabulary import option_line
from knep.config.conflicts import refuse_conflicts
from knep.config.external_app import slots_of, with_trainer
from knep.config.instantiate import allow_typed, allowed
from knep.config.overrides import SEVERAL_NUMBERS, line_of, parse
from knep.config.resolvers import SAFE, check_expansion, check_resolvers
from knep.config.schema import RunConfig, as_typed, check_ranges, key_paths, value_at
from knep.config.search_path import own_hydra
from knep.config.stages import SLOT, listed, refuse_node, refuse_stages
from knep.errors import InputError

# Keys that take words as well as numbers: their reader checks them.
_FREE = frozenset(
    {
        "accumulate",
        "compile",
        "metrics",
        "trainer.devices",
        "trainer.precision",
        "trainer.fast_dev_run",
        "trainer.strategy",
    }
)
# Numbers that a word may stand for.
_OR_WORD = {"init.slope": "auto"}
# Numbers of which there may be several.
_OR_SEVERAL = frozenset({"averaging.decay"})


@dataclass(frozen=True)
class Composed:
    """A checked config: plain resolved data, the option chosen in each group, and the overrides that made it.

    folder: where Hydra would let a whole run write.
    """

    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]
    folder: str = ""

    @property
    def run(self) -> RunConfig:
        """The config, typed."""
        return RunConfig.of(self.config)


def compose_config(
    overrides: Sequence[str], search: Sequence[str] = (), *, primary: str = "train", ahead: bool = False
) -> Composed:
    """Composes a primary config of knep with override lines as on the command line.

    primary: `train`, a whole run; or `knep`, the slots alone, for another project.
    search: further config folders ("file:///home/me/conf", "pkg://mypkg.conf"), searched after knep's own or, with
    `ahead`, before them, so that the same name means theirs.
    Raises InputError for whatever is misspelt, of a wrong type or out of range, or contradictory.
    """
    untold()
    overrides = readable(overrides)
    parsed = parse(overrides)
    swept = next((o for o in parsed if o.is_sweep_override()), None)
    if swept is not None:
        key, _, several = line_of(swept).partition("=")
        numbers = SEVERAL_NUMBERS.fullmatch(several)
        if key == SLOT:
            raise InputError(f"{line_of(swept)} is several values: write -m to run each of them, or one of them alone")
        one = f"{key}=[{several}] to mean a list" if numbers else f"{to_type(key, several)} to mean one"
        raise InputError(f"{line_of(swept)} is several values: write -m to run each of them, or {one}")
    named = [str(path) for o in parsed if o.key_or_group == "hydra.searchpath" for path in _items(o)]
    with own_hydra([*search, *named], ahead):
        known = _groups()
        groups = [o for o in parsed if _is_group(o, known)]
        plugin = any(o.key_or_group in ("hydra/launcher", "hydra/sweeper") for o in parsed)
        for override in groups:
            _check_group(override, primary, known)
        bare = (_compose if search or named else _of_knep)(primary, tuple(line_of(o) for o in groups))
        made = _task(bare, resolve=False)
        for override in parsed:
            if override.key_or_group.startswith("hydra"):
                _check_of_hydra(override, plugin)
            elif override not in groups:
                _check_value(override, made, primary, _chosen(bare))
        same = not search and not named and all(_sets_a_value(o) for o in parsed if o not in groups)
        cfg = _with_values(primary, parsed, groups) if same else _compose(primary, overrides)
        HydraConfig.instance().set_config(cfg)
        choices = _chosen(cfg)
        if primary == "train" and (search or named):  # a recipe's slots alone bring no Hydra with them
            _check_hydra(cfg, [line_of(o) for o in parsed if o.key_or_group.startswith("hydra")])
        unresolved = _task(cfg, resolve=False)
        check_resolvers(unresolved, SAFE.union(allowed()))
        check_expansion(unresolved)
        with _one_line():
            config = plain(cfg)
            folder = str(cfg.hydra.run.dir) if primary == "train" else ""
    for group in (*GROUPS[1:], "checkpoint"):
        if group in config and not isinstance(config[group], dict):
            raise InputError(f"{group} is {_kind(config[group])}, not a group of keys: mend the option's file")
    refuse_node(config.get(SLOT))
    refuse_unread(config, choices, {} if search or named else made)
    if primary == "train":
        _check_whole(made, config)
    check_ranges(config)
    refuse_conflicts(choices if primary == "train" else slots_of(choices), with_trainer(config))
    tell()
    return Composed(config, choices, list(overrides), folder)


def compose_recipe(name: str, overrides: Sequence[str] = (), search: Sequence[str] = ()) -> dict[str, Any]:
    """The slots of a named recipe, checked; folders of `search` come before knep's own. Raises InputError."""
    if not isinstance(name, str):
        raise InputError(
            f"a recipe is asked for by its name, got {name!r}: write one of {', '.join(options('recipe'))}"
        )
    for kind, lines in (("overrides", overrides), ("search", search)):
        if isinstance(lines, str):
            raise InputError(f"{kind}={lines!r} is a string: write a list, {kind}=[{lines!r}]")
    second = next((line for line in overrides if line.startswith("recipe=")), None)
    if second is not None:
        raise InputError(f"{second} in overrides chooses a second recipe: write knep.load({second[7:]!r})")
    allow_typed(overrides)
    lines = [line for line in overrides if not line.startswith(("allow_targets=", "budget."))]
    return compose_config([f"+recipe={name}", *lines], search, primary="knep", ahead=True).config


def _chosen(cfg: DictConfig) -> dict[str, str]:
    """Group -> option of a config that was composed with Hydra's own part."""
    return {k: str(v) for k, v in cfg.hydra.runtime.choices.items() if "/" not in k and "@" not in k}


def _items(override: Override) -> list[Any]:
    value = override.value()
    return value if isinstance(value, list) else [value]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The task's part of a config, resolved, as dicts, lists and scalars."""
    return _task(cfg, resolve=True)


def _task(cfg: DictConfig, resolve: bool) -> dict[str, Any]:
    task = OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"])
    task._set_parent(None)
    container = OmegaConf.to_container(task, resolve=resolve)
    assert isinstance(container, dict)
    config = {str(k): v for k, v in container.items()}
    if isinstance(config.get("accumulate"), dict):  # by epochs, which JSON has as text
        config["accumulate"] = {str(epoch): count for epoch, count in config["accumulate"].items()}
    return config


def _check_hydra(cfg: DictConfig, typed: Sequence[str]) -> None:
    """Refuses what an option sets of Hydra itself, which builds callbacks, launchers and loggers unchecked."""
    bare = _compose("train", typed)
    before, now = (OmegaConf.to_container(c.hydra, resolve=False) for c in (bare, cfg))
    assert isinstance(before, dict)
    assert isinstance(now, dict)
    for key in {*before, *now} - {"runtime", "overrides", "job"}:
        if before.get(key) != now.get(key):
            raise InputError(f"hydra.{key} is set by an option, which may set the task's keys only: type it yourself")
    for key in ("env_set", "env_copy", "chdir"):
        if before["job"].get(key) != now["job"].get(key):
            raise InputError(f"hydra.job.{key} is set by an option, which may set the task's keys only: remove it")


def _compose(primary: str, lines: Sequence[str]) -> DictConfig:
    with _one_line():
        return compose(primary, list(lines), return_hydra_config=True)


@functools.lru_cache(maxsize=64)
def _of_knep(primary: str, lines: tuple[str, ...]) -> DictConfig:
    """What a choice of options composes to where no folder but knep's own is searched; to look at, not to change.

    Runs of a study, or trials of a cure, differ in values and compose the same options again and again.
    """
    cfg = _compose(primary, lines)
    OmegaConf.set_readonly(cfg, True)
    return cfg


@functools.lru_cache(maxsize=64)
def _stored(primary: str, lines: tuple[str, ...]) -> bytes:
    return pickle.dumps(_of_knep(primary, lines))  # read again in a fifth of the time that a deep copy takes


def _sets_a_value(override: Override) -> bool:
    """Whether a line that chooses no option is one that Hydra applies last, to the config of the options chosen."""
    key = override.key_or_group
    return override.package is None and "/" not in key and (not key.startswith("hydra") or key == "hydra.run.dir")


def _with_values(primary: str, parsed: Sequence[Override], groups: Sequence[Override]) -> DictConfig:
    """What `_compose` makes of all lines, at a third of its time: the options are composed, their values are set."""
    cfg = pickle.loads(_stored(primary, tuple(line_of(o) for o in groups)))
    OmegaConf.set_readonly(cfg, None)
    with _one_line():
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in groups], cfg)
    hydra, task = cfg.hydra, [o for o in parsed if not o.is_hydra_override()]
    hydra.overrides.hydra = [o.input_line for o in parsed if o.is_hydra_override()]
    hydra.overrides.task = [o.input_line for o in task]
    hydra.runtime.cwd = os.getcwd()
    how = hydra.job.config.override_dirname
    hydra.job.override_dirname = get_overrides_dirname(task, list(how.exclude_keys), how.item_sep, how.kv_sep)
    return cfg


def _check_whole(before: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuses a config from which a key was deleted that every run asks for; a trick's own keys have defaults."""
    needed = [*before, *(f"{group}.{key}" for group in ("trainer", "checkpoint") for key in before.get(group) or ())]
    needed += [f"{group}._target_" for group in GROUPS if group in before and group != "callbacks"]
    missing = sorted(set(needed) - set(key_paths(config)))
    if missing:
        raise InputError(
            f"{missing[0]} is deleted, and every run needs it: leave out ~{missing[0]}, "
            "or write it into the option's file"
        )


def said(error: BaseException) -> str:
    """What Hydra or OmegaConf says, in one line; of a plugin that is missing, how to get it."""
    plugin = re.search(r"Could not find 'hydra/(launcher|sweeper)/(\w+)'", str(error))
    if plugin:
        kind, name = plugin.groups()
        return f"hydra/{kind}={name} is not installed: leave it out, or pip install hydra-{name}-{kind}"
    if isinstance(error, RecursionError):
        return "the config takes itself in, or is too deep: take out the option that does"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:3])


class _one_line:
    """Hydra's and OmegaConf's errors as one line."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, (HydraException, OmegaConfBaseException, YAMLError, RecursionError)):
            raise InputError(said(error)) from error


def _loader() -> Any:
    return GlobalHydra.instance().config_loader()


def _groups() -> list[str]:
    return sorted(_loader().list_groups(""))


def _is_group(override: Override, known: Sequence[str]) -> bool:
    name = override.key_or_group
    if name.startswith("hydra"):
        return False
    return name in known or "@" in name or ("." not in name and isinstance(override.value(), str) and "/" in name)


def _check_group(override: Override, primary: str, known: Sequence[str]) -> None:
    name, value = override.key_or_group, override.value()
    if "/" in name and name not in known and "@" not in name:
        raise InputError(f"there is no group {name}: choose from {', '.join(known)}")
    if primary == "knep" and not override.is_delete():
        refuse_unloaded(name, line_of(override))
    if (override.is_add() or override.is_force_add()) and name in GROUPS and (primary, name) != ("knep", "recipe"):
        raise InputError(
            f"{line_of(override)} adds a choice, and there is one already: write {line_of(override).lstrip('+')}"
        )
    if override.is_delete() and name in GROUPS:
        raise InputError(f"{name} is deleted, and every run needs it: leave out {line_of(override)}")
    if "@" in name or override.is_delete():
        return
    stages = listed(value) if name == SLOT else None
    if stages is not None:
        _check_stages(stages, override, primary, known)
    elif not isinstance(value, str) or value not in _options(name):
        word = line_of(override).partition("=")[2]
        line = option_line(name, word)
        near = f": {line}" if line else nearest(word, _options(name))
        raise InputError(f"{name}={word} is not an option{near}")


def _check_stages(stages: Sequence[str], override: Override, primary: str, known: Sequence[str]) -> None:
    for stage in stages:
        one = next(iter(parse([f"{SLOT}={stage}"])), override) if stage else override
        if one is not override and one.value() not in _options(SLOT):
            _check_group(one, primary, known)
    refuse_stages(stages)


def _options(group: str) -> list[str]:
    return sorted(_loader().get_group_options(group))


def nearest(word: str, known: Sequence[str]) -> str:
    """ ": did you mean X?" for the names that begin so or have it in them, or the nearest one; or the list of all."""
    begun = [name for name in known if len(word) > 2 and name.startswith(word)]
    begun = begun or [name for name in known if len(word) > 3 and word in name]
    close = begun if 0 < len(begun) <= 3 else difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else f": choose from {', '.join(known)}"


# The keys of Hydra's nodes that a launcher or sweeper of its own, or none, reads; of other nodes any name may be one.
_OF_HYDRA = {
    "run": ("dir",),
    "sweep": ("dir", "subdir"),
    "job": tuple(f.name for f in fields(JobConf)),
    "launcher": ("_target_",),
    "sweeper": tuple(f.name for f in fields(BasicSweeperConf)),
}


def _check_of_hydra(override: Override, plugin: bool) -> None:
    """Refuses a key that Hydra has not, where `+` would add it for nobody to read.

    plugin: whether another launcher or sweeper is chosen, with keys of its own.
    """
    key, line = override.key_or_group, line_of(override)
    if key == "hydra/job_logging" and override.value() not in ("default", "none", "colorlog"):
        raise InputError(f"{line} is no log that a run can write: leave it out, or write hydra/job_logging=none")
    if not key.startswith("hydra."):
        return
    _, first, *rest = key.split(".")
    known = sorted(f.name for f in fields(HydraConf))
    if first not in known:
        raise InputError(f"there is no key {key}: leave out {line}, or choose from {', '.join(known)}")
    if rest and first in _OF_HYDRA and rest[0] not in _OF_HYDRA[first] and not (plugin and first not in ("run", "job")):
        if first in ("launcher", "sweeper"):
            some = {"launcher": "joblib", "sweeper": "optuna"}[first]
            raise InputError(f"{key} is a key of another {first}: choose one, for example hydra/{first}={some}")
        raise InputError(f"there is no key {key}: choose from {', '.join(_OF_HYDRA[first])}")


def _check_value(override: Override, made: Mapping[str, Any], primary: str, choices: Mapping[str, str]) -> None:
    """made: what the choice of options alone composes to, unresolved."""
    key, typed = override.key_or_group, line_of(override).partition("=")[2]
    if primary == "knep" and not override.is_delete():
        refuse_unloaded(key, line_of(override))
    if override.is_delete():
        if "." not in key and key in made:
            raise InputError(f"{key} is deleted, and every run needs it: leave out {line_of(override)}")
        return
    known = set(key_paths(made))
    if key not in known:
        if override.is_add() or override.is_force_add():
            return  # looked for in the whole config
        raise InputError(no_key(key, typed, made, choices))
    if override.is_add():
        raise InputError(f"{line_of(override)} adds a key that is there already: write {key}={typed}")
    old = OmegaConf.to_container(OmegaConf.create({"v": value_at(made, key)}), resolve=False)["v"]  # type: ignore[index]
    same = re.fullmatch(r"\$\{(\w+)\}", old) if isinstance(old, str) else None
    old = made[same[1]] if same and same[1] in made else old
    new = override.value()
    if new == "???":
        raise InputError(f"{key}=??? stands for a value that is missing: write one")
    switch = isinstance(new, bool) and key != "data.cache"  # true is a place of knep's own there
    if key in PATHS and (switch or isinstance(new, (list, dict))):
        raise InputError(f"{key}={as_typed(new)} is {_kind(new)}: write a path, for example {key}=some/folder")
    if isinstance(old, list) and isinstance(new, list) and key.endswith(".betas") and len(new) != len(old):
        raise InputError(f"{key} takes {len(old)} numbers, got {len(new)}: write for example {key}={as_typed(old)}")
    word = _OR_WORD.get(key)
    if key in _OR_SEVERAL and isinstance(new, list) and new and all(_fits(old, one) for one in new):
        return
    if key not in _FREE and not _fits(old, new) and (word is None or new != word):
        kind = _kind(old) if word is None else f"{_kind(old)} or {word}"
        raise InputError(f"{key}={as_typed(new)} is {_kind(new)}: write {kind}, for example {key}={as_typed(old)}")


def _fits(old: object, new: object) -> bool:
    """Whether `new` may stand where the YAML has `old`; None there takes anything, words take numbers as names."""
    if old is None or (isinstance(old, str) and old.startswith("${")):
        return True
    if isinstance(old, bool) or isinstance(new, bool):
        return isinstance(old, bool) and isinstance(new, bool)
    if isinstance(old, float):
        return isinstance(new, (int, float)) and math.isfinite(new)
    if isinstance(old, str):
        return isinstance(new, (str, int, float)) or type(new).__name__ == "QuotedString"
    return isinstance(new, type(old))


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a group of keys"}
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    return names.get(type(value), "text")

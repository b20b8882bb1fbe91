"""From override lines to a checked config: every mistake is found here, before a folder is made or a step is run."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from knep.conflicts import refuse_conflicts
from knep.errors import InputError
from knep.listing import GROUPS, options
from knep.nodes import slots_of, with_trainer
from knep.resolvers import SAFE, check_resolvers
from knep.safe import allow_typed, allowed
from knep.searchpath import own_hydra

# Keys that take words as well as numbers: their reader checks them.
_FREE = frozenset(
    {"accumulate", "compile", "trainer.devices", "trainer.precision", "trainer.fast_dev_run", "trainer.strategy"}
)
_BRACKETS = 200
_DEVICES, _THREADS = 128, 128  # of one machine
_NAME = re.compile(r"[^\W_][\w +.,=@-]{0,199}")
_LARGEST = 3.4e38  # of float32
_AT_LEAST = {
    "trainer.max_epochs": 1,
    "trainer.num_nodes": 1,
    "trainer.members": 1,
    "log_every": 1,
    "trainer.check_val_every_n_epoch": 1,
}


@dataclass(frozen=True)
class Composed:
    """A checked config: plain resolved data, the option chosen in each group, and the overrides that made it.

    places: where Hydra is to make the folder of a `run` and of a `sweep`.
    """

    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]
    places: Mapping[str, str] = field(default_factory=dict)


def compose_config(
    overrides: Sequence[str], search: Sequence[str] = (), *, primary: str = "train", ahead: bool = False
) -> Composed:
    """Composes a primary config of knep with override lines as on the command line.

    primary: `train`, a whole run; or `knep`, the slots alone, for another project.
    search: further config folders ("file:///home/me/conf", "pkg://mypkg.conf"), searched after knep's own or, with
    `ahead`, before them, so that the same name means theirs.
    Raises InputError for whatever is misspelt, of a wrong type or out of range, or contradictory.
    """
    parsed = parse(overrides)
    swept = next((o for o in parsed if o.is_sweep_override()), None)
    if swept is not None:
        raise InputError(f"{_line(swept)} is several values: write -m to run each of them, or quote it to mean one")
    named = [str(path) for o in parsed if o.key_or_group == "hydra.searchpath" for path in _items(o)]
    with own_hydra([*search, *named], ahead):
        groups = [o for o in parsed if _is_group(o)]
        for override in groups:
            _check_group(override)
        bare = (_compose if search or named else _of_knep)(primary, tuple(_line(o) for o in groups))
        for override in parsed:
            if override not in groups:
                _check_value(override, bare)
        cfg = _compose(primary, overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        choices = {k: str(v) for k, v in cfg.hydra.runtime.choices.items() if "/" not in k and "@" not in k}
        if primary == "train" and (search or named):  # a recipe's slots alone bring no Hydra with them
            _check_hydra(cfg, [_line(o) for o in parsed if o.key_or_group.startswith("hydra")])
        check_resolvers(_task(cfg, resolve=False), SAFE.union(allowed()))
        with _one_line():
            config = plain(cfg)
            places = {kind: str(cfg.hydra[kind].dir) for kind in ("run", "sweep") if primary == "train"}
    for group in (*GROUPS[1:], "checkpoint"):
        if group in config and not isinstance(config[group], dict):
            raise InputError(f"{group} is {_kind(config[group])}, not a group of keys: mend the option's file")
    if primary == "train":
        _check_whole(bare, config)
    check_ranges(config)
    refuse_conflicts(choices if primary == "train" else slots_of(choices), with_trainer(config))
    return Composed(config, choices, list(overrides), places)


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
    lines = [line for line in overrides if not line.startswith("allow_targets=")]
    return compose_config([f"+recipe={name}", *lines], search, primary="knep", ahead=True).config


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
    return {str(k): v for k, v in container.items()}


def _check_hydra(cfg: DictConfig, typed: Sequence[str]) -> None:
    """Refuses what an option sets of Hydra itself, which builds callbacks, launchers and loggers unchecked."""
    bare = _compose("train", typed, return_hydra_config=True)
    before, now = (OmegaConf.to_container(c.hydra, resolve=False) for c in (bare, cfg))
    assert isinstance(before, dict)
    assert isinstance(now, dict)
    for key in {*before, *now} - {"runtime", "overrides", "job"}:
        if before.get(key) != now.get(key):
            raise InputError(f"hydra.{key} is set by an option, which may set the task's keys only: type it yourself")
    for key in ("env_set", "env_copy", "chdir"):
        if before["job"].get(key) != now["job"].get(key):
            raise InputError(f"hydra.job.{key} is set by an option, which may set the task's keys only: remove it")


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's override objects. Raises InputError for a line that is none."""
    parser = OverridesParser.create()
    parsed = []
    for line in overrides:
        if max(line.count(bracket) for bracket in "[{(") > _BRACKETS:
            raise InputError(f"{line[:40]!r}... has more than {_BRACKETS} brackets: write a config file")
        try:
            parsed += parser.parse_overrides([line])
        except (HydraException, RecursionError) as error:
            raise InputError(
                f"{line!r} is not an override: write key=value, and quote a value with special characters"
            ) from error
    return parsed


def _line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _compose(primary: str, lines: Sequence[str], return_hydra_config: bool = False) -> DictConfig:
    with _one_line():
        return compose(primary, list(lines), return_hydra_config=return_hydra_config)


@functools.lru_cache(maxsize=64)
def _of_knep(primary: str, lines: tuple[str, ...]) -> DictConfig:
    """What a choice of options composes to where no folder but knep's own is searched; to look at, not to change.

    Runs of a study, or trials of a cure, differ in values and compose the same options again and again.
    """
    cfg = _compose(primary, lines)
    OmegaConf.set_readonly(cfg, True)
    return cfg


def _check_whole(bare: DictConfig, config: Mapping[str, Any]) -> None:
    """Refuses a config from which a key was deleted that every run asks for; a trick's own keys have defaults."""
    before = _task(bare, resolve=False)
    needed = [*before, *(f"{group}.{key}" for group in ("trainer", "checkpoint") for key in before.get(group) or ())]
    needed += [f"{group}._target_" for group in GROUPS if group in before]
    missing = sorted(set(needed) - set(_flat(config)))
    if missing:
        raise InputError(f"{missing[0]} is deleted, and every run needs it: leave out ~{missing[0]}")


class _one_line:
    """Hydra's and OmegaConf's errors as one line."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, (HydraException, OmegaConfBaseException, YAMLError, RecursionError)):
            text = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise InputError(" ".join(text[:3])) from error


def _loader() -> Any:
    return GlobalHydra.instance().config_loader()


def _groups() -> list[str]:
    return sorted(_loader().list_groups(""))


def _is_group(override: Override) -> bool:
    name = override.key_or_group
    if name.startswith("hydra"):
        return False
    return name in _groups() or "@" in name or ("." not in name and isinstance(override.value(), str) and "/" in name)


def _check_group(override: Override) -> None:
    name, value = override.key_or_group, override.value()
    if "@" in name or not isinstance(value, str):
        if not isinstance(value, str) and not override.is_delete():
            raise InputError(f"{name}={value} is not an option: choose from {', '.join(_options(name))}")
        return
    if value not in _options(name):
        raise InputError(f"{name}={value} is not an option{nearest(value, _options(name))}")


def _options(group: str) -> list[str]:
    return sorted(_loader().get_group_options(group))


def nearest(word: str, known: Sequence[str]) -> str:
    """ ": did you mean X?" for the names that begin so, otherwise the nearest one; or the list of all."""
    begun = [name for name in known if word and name.startswith(f"{word}_")]
    close = begun if 0 < len(begun) <= 3 else difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else f": choose from {', '.join(known)}"


def _flat(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path
            yield from _flat(value, path)


def _check_value(override: Override, bare: DictConfig) -> None:
    key = override.key_or_group
    if key.startswith("hydra") or override.is_delete():
        return
    container = OmegaConf.to_container(bare, resolve=False)
    known = list(_flat(container))
    if key not in known:
        if override.is_add() or override.is_force_add():
            return
        last = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
        words = sorted({*known, *_groups()})
        hint = difflib.get_close_matches(key, last, n=1, cutoff=0.5) or difflib.get_close_matches(key, words, n=1)
        choice = f"did you mean {hint[0]}?" if hint else f"choose from {', '.join(sorted(last) or _groups())}"
        raise InputError(f"there is no key {key}: {choice}")
    old = OmegaConf.to_container(OmegaConf.create({"v": _at(container, key)}), resolve=False)["v"]  # type: ignore[index]
    new = override.value()
    if key not in _FREE and not _fits(old, new):
        raise InputError(f"{key}={_shown(new)} is {_kind(new)}: write {_kind(old)}, for example {key}={_shown(old)}")


def _at(container: Any, key: str) -> Any:
    for part in key.split("."):
        container = container[part]
    return container


def _fits(old: Any, new: Any) -> bool:
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


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a group of keys"}
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    return names.get(type(value), "text")


def _shown(value: Any) -> str:
    text = getattr(value, "text", value)
    if isinstance(text, bool):
        return str(text).lower()
    return "null" if text is None else str(text)


def check_ranges(config: Mapping[str, Any]) -> None:
    """Ranges of the keys that no constructor checks in time; keys that the config lacks are not asked for."""
    present = set(_flat(config))
    for key in present:
        value = _at(config, key)
        if isinstance(value, float) and _LARGEST < abs(value) < math.inf:
            raise InputError(f"{key}={value:g} is beyond float32, as weights are: write at most {_LARGEST:.2g}")
    for key, least in _AT_LEAST.items():
        if key in present:
            value = _at(config, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
                raise InputError(f"{key}={_shown(value)} must be at least {least}")
    if "trainer.limit_train_batches" in present and config["trainer"]["limit_train_batches"] == 0:
        raise InputError(
            "trainer.limit_train_batches=0 leaves nothing to train on: write a number of batches or a share"
        )
    if not isinstance(config["accumulate"], int) or isinstance(config["accumulate"], bool) or config["accumulate"] < 1:
        raise InputError(f"accumulate={config['accumulate']} must be a whole number of micro-batches, at least 1")
    if not 0 < config["layer_decay"] <= 1:
        raise InputError(f"layer_decay={config['layer_decay']} must be in (0, 1]")
    devices = config.get("trainer", {}).get("devices")
    if isinstance(devices, int) and devices > _DEVICES:
        raise InputError(f"trainer.devices={devices} starts as many processes: write at most {_DEVICES}")
    if not _NAME.fullmatch(str(config.get("name", "x"))):
        raise InputError(f"name={config['name']} ends the run folder's name: write up to 200 letters, digits, - or _")
    if not 0 <= config.get("seed", 0) < 2**32:
        raise InputError(f"seed={config['seed']} must be in [0, 2**32)")
    threads = config.get("threads")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads={threads} must be a whole number, at least 1, or null for all cores")
    if threads is not None and threads > _THREADS:
        raise InputError(f"threads={threads} starts as many threads: write at most {_THREADS}, or null for all cores")

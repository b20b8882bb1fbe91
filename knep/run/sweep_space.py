"""What a sweep will run, as far as its sweeper can tell before the first job."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from knep.config.compose import compose_config, said
from knep.config.overrides import parse
from knep.config.search_path import own_hydra
from knep.errors import InputError

_GRID = f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}"
# Where Hydra's sweepers keep what is swept, beside the command line.
_SPACES = ("params", "search_space", "parametrization")
# And how they write it, where it is no line of Hydra's: the values that are tried, or the ends between which they lie.
_VALUES = (("choices",), ("values",), ("bounds",), ("low", "high"), ("lower", "upper"), ("value",))


@dataclass(frozen=True)
class Space:
    """folder: of the sweep; fixed: the keys that every job has the same; jobs: the override lines of jobs to check.

    grid: whether these are all the jobs that there will be; otherwise each value stands in one of them, or each end.
    overrides: of the command line, as the sweeper can read them.
    """

    folder: Path
    fixed: frozenset[str]
    jobs: list[list[str]]
    grid: bool
    overrides: list[str]


def space(overrides: Sequence[str], search: Sequence[str]) -> Space:
    """What the sweep of these override lines will run. Raises InputError for one that its sweeper cannot run."""
    parsed = parse(overrides)
    try:
        return _space(overrides, search)
    except (HydraException, OmegaConfBaseException, YAMLError, AssertionError) as error:
        # Of the task's own keys it is known what else may have been meant.
        same = [o for o in parsed if not o.is_sweep_override() and not o.is_hydra_override()]
        compose_config([_as_it_is(o) for o in same], search)
        hydra = " ".join(_as_it_is(o) for o in parsed if o.is_hydra_override())
        where = f"{hydra}: " if isinstance(error, AssertionError) else ""
        raise InputError(where + " ".join(said(error).split())) from error


def _space(overrides: Sequence[str], search: Sequence[str]) -> Space:
    with own_hydra(search, ahead=False):
        loader: Any = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("train", list(overrides), run_mode=RunMode.MULTIRUN)
        HydraConfig.instance().set_config(cfg)
        sweeper: Any = OmegaConf.to_container(cfg.hydra.sweeper, resolve=True)
        _check_direction(sweeper.get("direction"))
        grid = sweeper["_target_"] == _GRID
        lines = [*_lines(sweeper, grid), *cfg.hydra.overrides.task]
        parsed = {override.get_key_element(): override for override in parse(lines)}  # the last word counts
        for override in parsed.values():
            override.config_loader = loader
        fixed = frozenset(key for key, override in parsed.items() if not override.is_sweep_override())
        jobs = _grid(list(parsed.values())) if grid else _samples(parsed)
        typed = list(overrides) if grid else [_listed(line, parsed) for line in overrides]
        return Space(Path(cfg.hydra.sweep.dir), fixed, jobs, grid, typed)


def _check_direction(direction: object) -> None:
    """Refuses what knep's jobs do not return: a number that should rise, or several."""
    wanted = getattr(direction, "name", direction)
    if wanted not in (None, "minimize"):
        raise InputError(f"hydra.sweeper.direction={wanted}: a job returns its val/loss, write minimize")


def _lines(sweeper: Mapping[str, Any], grid: bool) -> Iterator[str]:
    """The override lines that stand in the sweeper's own config, those alone that Hydra can read."""
    for key, value in itertools.chain.from_iterable((sweeper.get(name) or {}).items() for name in _SPACES):
        line = f"{key}={value}" if not isinstance(value, (Mapping, list)) else f"{key}={_choice(value)}"
        if grid:
            yield line  # Hydra's own sweeper reads nothing else
            continue
        try:
            parse([line])
        except InputError:
            continue  # a notation of its own: it says itself what is wrong
        yield line


def _choice(values: Any) -> str:
    if isinstance(values, Mapping):
        found = ([values[k] for k in keys] for keys in _VALUES if all(k in values for k in keys))
        values = next(found, [])
        values = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    return f"choice({','.join(map(str, values))})"


def _grid(overrides: list[Override]) -> list[list[str]]:
    """The jobs of Hydra's own sweeper, in its order."""
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise InputError(
                f"{override.input_line} is a range to draw from, and this sweep lists its values: write "
                f"{override.key_or_group}=0.1,0.3 or hydra/sweeper=optuna (pip install hydra-optuna-sweeper)"
            )
        if override.is_discrete_sweep() and not _values(override):
            raise InputError(f"{override.input_line} is no value at all: write {override.key_or_group}=A,B")
    return [list(job) for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


def _samples(parsed: Mapping[str, Override]) -> list[list[str]]:
    """Jobs in which every value, or either end, of each swept key stands once, beside the first of the others."""
    lines = {key: [f"{key}={value}" for value in _values(o)] for key, o in parsed.items() if o.is_sweep_override()}
    fixed = [_as_it_is(override) for override in parsed.values() if not override.is_sweep_override()]
    first = {key: values[0] for key, values in lines.items() if values}
    jobs = [[*fixed, *first.values()]]
    return jobs + [[*fixed, *(first | {key: v}).values()] for key, values in lines.items() for v in values[1:]]


def _listed(line: str, parsed: Mapping[str, Override]) -> str:
    """A line with the options that `glob(...)` means, which sweepers but Hydra's own have no way to look up."""
    override = parsed.get(line.partition("=")[0])
    globbed = override is not None and override.input_line == line and isinstance(override.value(), Glob)
    return f"{override.get_key_element()}=choice({','.join(_values(override))})" if override and globbed else line


def _as_it_is(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _values(override: Override) -> list[str]:
    """The values of a swept key, as text; of an interval both ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return list(override.sweep_string_iterator())

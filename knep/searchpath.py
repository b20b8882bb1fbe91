"""Hydra over knep's configs and folders of the user's, without disturbing a Hydra app that is running."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_module
from hydra.core.config_search_path import SearchPathElement
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime

from knep.errors import InputError

_MOST = 10_000


@contextmanager
def own_hydra(search: Sequence[str], ahead: bool) -> Iterator[None]:
    """Hydra over knep's configs and `search`, for a moment: an app that calls knep while it runs keeps its own."""
    running, its_config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    its_name = JobRuntime.instance().get("name")  # which its log is called by
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("knep.conf", version_base="1.3"):
            _extend(search, ahead)
            yield
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = running, its_config
        JobRuntime.instance().set("name", its_name)


def _extend(search: Sequence[str], ahead: bool) -> None:
    loader: Any = GlobalHydra.instance().config_loader()
    folders = loader.get_search_path().get_path()
    schema = next(i for i, folder in enumerate(folders) if folder.provider == "schema")
    main = next(i for i, folder in enumerate(folders) if folder.provider == "main")
    at = main if ahead else schema
    folders[at:at] = [SearchPathElement("search", folder) for folder in search]
    loader.repository.initialize_sources(loader.get_search_path())
    for folder in search:
        if folder.startswith("file://"):
            for path in sorted(Path(folder.removeprefix("file://")).glob("*/*.yaml")):
                check_aliases(path)
    for source in loader.get_sources():
        if source.provider == "search" and not source.available():
            where = f"{source.scheme()}://{source.path}"
            raise InputError(f"search path {where} is not there: write file:///FOLDER, or pkg://PACKAGE.FOLDER")


def check_aliases(path: Path) -> None:
    """Raises InputError for YAML whose aliases stand for more than a config has: OmegaConf writes them all out."""
    try:
        with path.open(encoding="utf-8") as f:
            size = _size(yaml.compose(f, Loader=yaml.SafeLoader), {})
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # Hydra says what is wrong with it, if it is asked for
    except RecursionError:
        size = math.inf
    if size > _MOST:
        raise InputError(f"{path} has aliases for more than {_MOST:,} values: write them out")


def _size(node: Any, known: dict[int, float]) -> float:
    """Values of a YAML node, those behind an alias each time."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted: what holds itself has no end
        held = (
            [v for pair in node.value for v in (pair if isinstance(pair, tuple) else (pair,))]
            if isinstance(node, yaml.CollectionNode)
            else []
        )
        known[id(node)] = 1 + sum(_size(value, known) for value in held)
    return known[id(node)]

"""Hydra over knep's configs and folders of the user's, without disturbing a Hydra app that is running."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_module
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_search_path import SearchPathElement
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from knep.config.stage_files import taught
from knep.errors import InputError
from knep.io.untrusted_folder import read_text
from knep.utils.text import shortened, shown

_MOST, _MOST_FILES = 10_000, 2_000
_KINDS = frozenset({"null", "bool", "int", "float", "str", "seq", "map", "merge"})
_KEYS = (":str", ":merge")
_REMEDY = "write file:///FOLDER, or pkg://PACKAGE.FOLDER"
taught()  # at import, so that jobs in a launcher's other processes compose lists too


@contextmanager
def own_hydra(search: Sequence[str], ahead: bool) -> Iterator[None]:
    """Hydra over knep's configs and `search`, for a moment: an app that calls knep while it runs keeps its own."""
    running, its_config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    its_name = JobRuntime.instance().get("name")  # which its log is called by
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("knep.conf", version_base="1.3"):
            _extend(search, ahead)
            with _files_counted():
                yield
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = running, its_config
        JobRuntime.instance().set("name", its_name)


def _extend(search: Sequence[str], ahead: bool) -> None:
    for folder in search:
        scheme, found, _ = folder.partition("://")
        if found and scheme not in ("file", "pkg"):
            raise InputError(f"search path {shown(folder)} is neither a folder nor a package: {_REMEDY}")
    loader: Any = GlobalHydra.instance().config_loader()
    folders = loader.get_search_path().get_path()
    schema = next(i for i, folder in enumerate(folders) if folder.provider == "schema")
    main = next(i for i, folder in enumerate(folders) if folder.provider == "main")
    at = main if ahead else schema
    folders[at:at] = [SearchPathElement("search", folder) for folder in search]
    loader.repository.initialize_sources(loader.get_search_path())
    for source in loader.get_sources():
        if source.provider == "search":
            if not source.available():
                raise InputError(f"search path {source.scheme()}://{shown(source.path)} is not there: {_REMEDY}")
            source.load_config = partial(_load, source, source.load_config)


def _load(source: Any, load: Callable[[str], Any], config_path: str) -> Any:
    """Hydra's reading of an option's file, once it was looked through; what the file makes it raise as one line."""
    file = f"{config_path.removesuffix('.yaml')}.yaml"
    place = resources.files(source.path) / file if source.scheme() == "pkg" else Path(source.path, file)
    text = read_text(place, "write an option's file") if isinstance(place, Path) else place.read_text("utf-8")
    check_yaml(text, str(place))
    try:
        return load(config_path)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        raise
    except Exception as error:  # OmegaConf raises what Python does about a value: a number of 5,000 digits, a date
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{shown(str(place))} is no config ({type(error).__name__}: {said}): mend it") from error


def check_yaml(text: str, place: str) -> None:
    """Raises InputError for YAML that is more than a config has, or has values of other kinds than a config's.

    That is aliases for very many values, since OmegaConf writes them all out, and tags such as !!set.
    """
    try:
        root = yaml.compose(text, Loader=get_yaml_loader())
        if root is not None:
            _check_tags(root, place)
        size = _size(root, {})
    except yaml.YAMLError:
        return  # Hydra says what is wrong with it
    except RecursionError:
        size = math.inf
    if size > _MOST:
        raise InputError(f"{shown(place)} has aliases for more than {_MOST:,} values, or is too deep: write them out")


def _check_tags(root: Any, place: str) -> None:
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _KINDS:
            tag = shortened(node.tag.replace("tag:yaml.org,2002:", "!!"))
            raise InputError(f"{shown(place)} has a value of the kind {tag}: write a number, text, list or group")
        if isinstance(node, yaml.MappingNode):
            odd = [k for k, _ in node.value if isinstance(k, yaml.ScalarNode) and not k.tag.endswith(_KEYS)]
            if odd:
                raise InputError(f"{shown(place)} has a key {shortened(odd[0].value)} that is no text: quote it")
        waiting += _held(node)


def _held(node: object) -> list[Any]:
    if not isinstance(node, yaml.CollectionNode):
        return []
    return [v for pair in node.value for v in (pair if isinstance(pair, tuple) else (pair,))]


def _size(node: object, known: dict[int, float]) -> float:
    """Values of a YAML node, those behind an alias each time."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted: what holds itself has no end
        known[id(node)] = 1 + sum(_size(value, known) for value in _held(node))
    return known[id(node)]


@contextmanager
def _files_counted() -> Iterator[None]:
    """Refuses lists of defaults that take in files, and those others, without end; each counts where it stands."""
    load, left = CachingConfigRepository.load_config, [_MOST_FILES]

    def counted(self: CachingConfigRepository, config_path: str) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise InputError(f"{shown(config_path)}: its defaults take in more than {_MOST_FILES:,} files: name fewer")
        return load(self, config_path)

    CachingConfigRepository.load_config = counted
    try:
        yield
    finally:
        CachingConfigRepository.load_config = load

"""Hydra over knep's configs and folders of the user's, without disturbing a Hydra app that is running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import initialize_config_module
from hydra.core.config_search_path import SearchPathElement
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from knep.errors import InputError


@contextmanager
def own_hydra(search: Sequence[str], ahead: bool) -> Iterator[None]:
    """Hydra over knep's configs and `search`, for a moment: an app that calls knep while it runs keeps its own."""
    running, its_config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("knep.conf", version_base="1.3"):
            _extend(search, ahead)
            yield
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = running, its_config


def _extend(search: Sequence[str], ahead: bool) -> None:
    loader: Any = GlobalHydra.instance().config_loader()
    folders = loader.get_search_path().get_path()
    schema = next(i for i, folder in enumerate(folders) if folder.provider == "schema")
    main = next(i for i, folder in enumerate(folders) if folder.provider == "main")
    at = main if ahead else schema
    folders[at:at] = [SearchPathElement("search", folder) for folder in search]
    loader.repository.initialize_sources(loader.get_search_path())
    for source in loader.get_sources():
        if source.provider == "search" and not source.available():
            where = f"{source.scheme()}://{source.path}"
            raise InputError(f"search path {where} is not there: write file:///FOLDER, or pkg://PACKAGE.FOLDER")

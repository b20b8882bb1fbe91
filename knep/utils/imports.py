"""Modules of the current folder, for what a user names outright: found behind all that is installed, or refused."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from knep.errors import InputError
from knep.utils.text import shown

_MOST_BYTES = 1 << 20  # of a module whose imports are looked at


def see_current_folder(name: str, key: str) -> None:
    """Makes the module of a dotted name importable that a user wrote, and that lies in the current folder alone.

    key: what the error calls the name. The folder comes last: what is installed, or comes with Python, is never taken
    from it. Raises InputError where the module, or one that it imports, is found there and elsewhere under one name.
    """
    here, top = Path.cwd(), name.partition(".")[0]
    own = _spec_in(top, here)
    if own is None or (own.origin is None and _elsewhere(top, here)):
        return
    for module in _with_imports(top, here):
        other = _elsewhere(module, here)
        if other:
            raise InputError(
                f"{key}={shown(name)}: module {module} lies in {shown(here)} and is {shown(other)} too: rename yours, "
                "so that it is clear which one is meant"
            )
    if str(here) not in sys.path and "" not in sys.path:
        sys.path.append(str(here))
    importlib.invalidate_caches()


def _spec_in(module: str, folder: Path) -> ModuleSpec | None:
    return PathFinder.find_spec(module, [str(folder)])


def _elsewhere(module: str, here: Path) -> str:
    """Where a top-level module would come from, if that is not `here`; nothing for a folder without a module in it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # __main__ has none
        return ""
    origin = spec.origin if spec else None
    if origin is None or origin == "namespace":
        return ""
    own = _spec_in(module, here)
    return "" if own and own.origin and os.path.realpath(own.origin) == os.path.realpath(origin) else _named(origin)


def _named(origin: str) -> str:
    return "a module of Python itself" if origin in ("built-in", "frozen") else origin


def _with_imports(top: str, here: Path) -> Iterator[str]:
    """A module of a folder, and those of the same folder that it and they import."""
    waiting, seen = [top], {top}
    while waiting:
        module = waiting.pop()
        yield module
        for name in _imports(module, here) - seen:
            seen.add(name)
            own = _spec_in(name, here)
            if own is not None and own.origin is not None:
                waiting.append(name)


def _imports(module: str, here: Path) -> set[str]:
    """Top-level names that the files of a module import."""
    folder, file = here / module, here / f"{module}.py"
    found: set[str] = set()
    for path in folder.rglob("*.py") if folder.is_dir() else [file]:
        with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # the import says so
            if path.is_file() and path.stat().st_size <= _MOST_BYTES:
                found |= _top_names(ast.parse(path.read_bytes()))
    return found


def _top_names(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names

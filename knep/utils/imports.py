"""Modules of the current folder, for what a user names outright: found behind all that is installed, or refused."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import reduce
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

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
            stat = path.stat()
            if path.is_file() and stat.st_size <= _MOST_BYTES:
                found |= _top_names(path, (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size))
    return found


@functools.lru_cache(maxsize=10_000)
def _top_names(path: Path, stamp: tuple[int, ...]) -> frozenset[str]:
    """stamp: of the file as it is: every name of a config asks anew, and a clone of knep has seconds of files."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return frozenset(names)


def find(path: str | None, key: str, example: str = "mypkg.nets:build", builds: str = "builds the model") -> Any:
    """What "package.module:name" or "package.module.name" names; the current folder is seen too.

    key: what the error calls the path; example, builds: a path to write, and what it should lead to. Raises InputError
    naming the module and the attribute.
    """
    if not path or not isinstance(path, str):
        raise InputError(f"{key} is missing: write {key}={example}, the path of what {builds}")
    module_name, _, names = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not names:
        raise InputError(f"{key}={shown(path)} names no module and builder: write {key}={example}")
    hint = "name a function or class that " + ("builds an nn.Module" if "model" in builds else builds)
    return reduce(
        lambda owner, name: _member(owner, name, f"{key}={path}", hint), names.split("."), _module(module_name, key)
    )


def _module(name: str, key: str) -> Any:
    see_current_folder(name, key)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"{key}: importing {name} failed, because module {error.name} is missing") from error
        raise InputError(
            f"{key}: there is no module {error.name}, neither installed nor in {Path.cwd()}: check the spelling, or "
            "run from the folder that holds it"
        ) from error
    except Exception as error:  # a module of another project may raise anything while it is imported
        text = " ".join(str(error).split())
        raise InputError(f"{key}: importing {name} failed: {type(error).__name__}: {text}") from error


def _member(owner: Any, name: str, where: str, hint: str) -> Any:
    if hasattr(owner, name):
        return getattr(owner, name)
    near = get_close_matches(name, [n for n in vars(owner) if not n.startswith("_")], n=1)
    kind = "module" if inspect.ismodule(owner) else "class"
    said = f"did you mean {near[0]}?" if near else hint
    raise InputError(f"{where}: {kind} {owner.__name__} has no attribute {name}: {said}")

"""The code that a run came from, as a hash: knep's own sources, and those of the user's that its config names."""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from knep.version import __version__

_KNEP = Path(__file__).resolve().parents[1]
_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
_BEFORE = frozenset(sys.modules)
_MOST = 1000  # modules

# What was loaded is what runs, whatever became of its file since: module -> (hash of its source, what it imports).
_loaded: WeakKeyDictionary[ModuleType, tuple[bytes, frozenset[str]]] = WeakKeyDictionary()


def code_hash(config: Mapping[str, Any], beside: Iterable[str] = ()) -> str:
    """12 hex digits that name the code of a run: knep, and each module of the user's that its config leads to.

    These are the modules of every `_target_` and `path` outside site-packages, and what they import in turn; beside:
    further ones, which no import statement names.
    """
    digest = hashlib.sha256(_of_knep())
    for name, source in sorted(_modules([*_named(config), *beside]).items()):
        digest.update(name.encode() + b"\0" + source)
    return digest.hexdigest()[:12]


def loaded_beside(config: Mapping[str, Any]) -> list[str]:
    """The user's modules that were imported since this one was, where the config names code of the user's and no import
    statement in it names them: `import_module(name)`.
    """
    known = _modules(_named(config))
    new = [name for name in sys.modules if name not in _BEFORE and name not in known] if known else []
    return sorted(name for name in new if name.partition(".")[0] != "knep" and _is_users(name))[:_MOST]


@functools.cache
def _of_knep() -> bytes:
    """Of its version and sources, committed or not, as they are when this process first asks."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(_KNEP.rglob("*.py")):
        digest.update(str(path.relative_to(_KNEP)).encode() + b"\0" + _digest(path))
    return digest.digest()


def _named(node: object) -> Iterator[str]:
    """What a config builds, as dotted names: "mypkg.nets.build"."""
    if isinstance(node, Mapping):
        yield from (v.replace(":", ".") for k in ("_target_", "path") if isinstance(v := node.get(k), str))
    for value in node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ():
        yield from _named(value)


def _modules(names: Iterable[str]) -> dict[str, bytes]:
    """Module -> hash of its source, for the user's modules that dotted names lead through, and those they import."""
    found: dict[str, bytes] = {}
    seen: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if module in seen:
                continue
            seen.add(module)
            if not module or not _is_users(module):
                break
            found[module], imported = _source(module)
            left += imported
    return found


def _is_users(module: str) -> bool:
    spec = _spec(module)
    if spec is None or spec.name.partition(".")[0] == "knep":
        return False
    places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
    return any(place and _outside(Path(place).resolve()) for place in places)


def _outside(path: Path) -> bool:
    """Whether a file is neither installed nor Python's own."""
    installed = _INSTALLED & set(path.parts) or any(path.is_relative_to(p) for p in (_KNEP, *_STANDARD))
    return not installed


def _spec(module: str) -> ModuleSpec | None:
    """Where a module comes from, without importing it; None for what is no module."""
    if module in sys.modules:
        loaded = sys.modules[module]
        file = getattr(loaded, "__file__", None)  # a script that was started by its path has no more than this
        return getattr(loaded, "__spec__", None) or (spec_from_file_location(module, file) if file else None)
    parent = module.rpartition(".")[0]
    above = _spec(parent) if parent else None
    path = None if above is None else above.submodule_search_locations
    if parent and path is None:
        return None
    try:
        found = (finder.find_spec(module, path) for finder in sys.meta_path)
        return next((spec for spec in found if spec is not None), None)
    except (ImportError, ValueError):
        return None


def _source(module: str) -> tuple[bytes, frozenset[str]]:
    """The hash of a module's file, and the names that it imports anywhere in it."""
    loaded = sys.modules.get(module)
    if loaded is not None and loaded in _loaded:
        return _loaded[loaded]
    spec = _spec(module)
    file = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
    if spec is None or file is None:
        return b"", frozenset()  # a folder without __init__.py
    package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
    read = _digest(file), frozenset(_imports(file, package))
    if loaded is not None:
        _loaded[loaded] = read
    return read


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return b""


def _imports(file: Path, package: str) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return  # compiled, or no Python
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names if base)
        elif isinstance(node, ast.Call) and _imports_by_name(node):
            (name,) = (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
            yield _absolute(str(name), package)


def _absolute(name: str, package: str) -> str:
    """The name of an import without its leading dots; nothing where they lead out of the package."""
    try:
        return resolve_name(name, package)
    except ImportError:
        return ""


def _imports_by_name(call: ast.Call) -> bool:
    """Whether it is `import_module("mypkg.nets")`, by whatever way it is called."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name in ("import_module", "__import__") and bool(call.args) and isinstance(call.args[0], ast.Constant)

"""The keywords that a class or function takes, read from its source: nothing is imported, so nothing of it is run."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

# Packages whose `**kwargs` are no promise: what their signatures do not name, no line of theirs reads.
OWN = ("knep.", "lightning.", "pytorch_optimizer.", "torch.")
_DEEPEST = 20
_Defined = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Takes:
    """names: keywords in the order of the signature; more: whether any other is taken too."""

    names: tuple[str, ...]
    more: bool = False


@lru_cache(maxsize=256)
def takes(target: str) -> Takes | None:
    """What the class or function of a dotted name takes; None where no source says it."""
    parts = target.replace(":", ".").split(".")
    for i in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:i])
        if _source(module) is not None:
            found = _find(module, parts[i], 0) if i == len(parts) - 1 else None
            return None if found is None else _takes(*found, 0)
    return None


def _spec(module: str) -> ModuleSpec | None:
    """Where a module lies, without importing the packages above it."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first) or PathFinder.find_spec(first, [os.getcwd()])
    except (ImportError, ValueError):
        return None
    for part in rest:
        if spec is None or not spec.submodule_search_locations:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return spec


@lru_cache(maxsize=256)
def _source(module: str) -> ast.Module | None:
    spec = _spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        return ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module's level, those under `if` and `try` too."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try, ast.ExceptHandler)):
                yield from _statements(getattr(statement, field, []))


def _find(module: str, name: str, depth: int) -> tuple[_Defined, str] | None:
    """The definition that a name of a module leads to, and the module that it stands in."""
    tree = _source(module)
    if tree is None or depth > _DEEPEST:
        return None
    found, stars = None, []
    for statement in _statements(tree.body):
        if isinstance(statement, _Defined) and statement.name == name:
            found = (statement, module)
        elif isinstance(statement, ast.ImportFrom):
            origin = _origin(module, statement)
            stars += [origin] if any(alias.name == "*" for alias in statement.names) else []
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    found = _find(origin, alias.name, depth + 1) or found
        elif isinstance(statement, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in statement.targets
        ):
            value = statement.value
            found = _find(module, value.id, depth + 1) if isinstance(value, ast.Name) and value.id != name else None
    return found or next((hit for star in stars if (hit := _find(star, name, depth + 1))), None)


def _origin(module: str, statement: ast.ImportFrom) -> str:
    """The module that `from ... import` names, with its leading dots taken from `module`."""
    if not statement.level:
        return statement.module or ""
    spec = _spec(module)
    package = bool(spec and spec.submodule_search_locations)
    parts = module.split(".")
    base = parts[: len(parts) - statement.level + package]
    return ".".join([*base, *(statement.module or "").split(".")]).rstrip(".")


def _takes(node: _Defined, module: str, depth: int) -> Takes | None:
    if not isinstance(node, ast.ClassDef):
        return _of_function(node, module, None)
    bases = [_base(base, module, depth) for base in node.bases]
    above = next((b for b in bases if b is not None), None) if node.bases else Takes(())
    init = next((s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None)
    if init is not None:
        made = _of_function(init, module, above)
        return Takes(made.names[1:], made.more)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = tuple(
            s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
        )
        return Takes((*(above.names if above else ()), *fields), above is None or above.more)
    return above


def _base(base: ast.expr, module: str, depth: int) -> Takes | None:
    """What a base class takes, for one that is written as a name, or as a name of an imported module."""
    if isinstance(base, ast.Subscript):
        base = base.value
    if depth > _DEEPEST:
        return None
    if isinstance(base, ast.Name):
        found = _find(module, base.id, 0)
        return None if found is None else _takes(*found, depth + 1)
    return takes(_absolute(ast.unparse(base), module)) if isinstance(base, ast.Attribute) else None


def _absolute(dotted: str, module: str) -> str:
    """`nn.Module` as `torch.nn.Module`, by the imports of the module that says so."""
    first, _, rest = dotted.partition(".")
    for statement in _statements(getattr(_source(module), "body", [])):
        for alias in getattr(statement, "names", ()):
            if isinstance(statement, ast.Import) and (alias.asname or alias.name) == first:
                return f"{alias.name}.{rest}"
            if isinstance(statement, ast.ImportFrom) and (alias.asname or alias.name) == first:
                return f"{_origin(module, statement)}.{alias.name}.{rest}"
    return dotted


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str, above: Takes | None) -> Takes:
    """above: what the base classes' constructor takes, to which further keywords may go."""
    arguments = node.args
    names = tuple(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    if arguments.kwarg is None:
        return Takes(names)
    rest = arguments.kwarg.arg
    used = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == rest]
    if not used:
        return Takes(names)
    passed = above.names if above and _passed_up(node, rest) else ()
    further = (*passed, *_named(node, rest))
    return Takes((*names, *(n for n in further if n not in names)), not f"{module}.".startswith(OWN))


def _passed_up(node: ast.AST, rest: str) -> bool:
    """Whether `**rest` goes on to the constructor of the base class."""
    calls = (n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == "super().__init__")
    return any(k.arg is None and ast.unparse(k.value) == rest for call in calls for k in call.keywords)


def _named(node: ast.AST, rest: str) -> Iterator[str]:
    """The words that a function asks its `**kwargs` for, by `get`, `pop` or brackets."""
    for n in ast.walk(node):
        held, key = None, None
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in ("get", "pop") and n.args:
            held, key = n.func.value, n.args[0]
        elif isinstance(n, ast.Subscript):
            held, key = n.value, n.slice
        if isinstance(held, ast.Name) and held.id == rest and isinstance(key, ast.Constant):
            yield str(key.value)

"""OmegaConf's resolvers in configs: `${oc.env:TOKEN}` in a file would write the reader's secrets to config.yaml.

What a shell fills in on the command line is the user's own doing; a config gets the few resolvers named here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from knep.errors import InputError

_MOST = 20_000
_REFERENCE = re.compile(r"\$\{\s*([^${}:\s]+)\s*\}")
SAFE = frozenset({"hydra", "now", "oc.select", "oc.dict.keys", "oc.dict.values"})


def check_resolvers(node: object, allowed: frozenset[str] = SAFE) -> None:
    """Raises InputError naming the first key of an unresolved config whose value calls any other resolver."""
    for path, text in _texts(node, ""):
        for name in used(text):
            if name not in allowed:
                raise InputError(
                    f"{path}={text} calls {name}, and config.yaml would keep what it says: write the value, or let the "
                    f"shell fill it in as in {path}=$VALUE"
                )


def check_expansion(config: Mapping[str, Any]) -> None:
    """Raises InputError naming a key whose value stands for very many others by ${key}, each of which stands for more.

    config: unresolved. What goes round in a circle OmegaConf refuses itself.
    """
    known: dict[tuple[str, ...], float] = {}

    def size(way: tuple[str, ...]) -> float:
        """Values and characters that a key stands for, in units of a value."""
        way, node = _at(config, way)
        if way not in known:
            known[way] = 0  # a circle
            if isinstance(node, str):
                known[way] = 1 + sum(size(_way(found, way)) for found in _REFERENCE.findall(node)[:_MOST])
            else:
                known[way] = 1 + sum(size((*way, key)) for key in _keys(node))
        return known[way]

    try:
        for key in config:
            if size((str(key),)) > _MOST:
                raise InputError(f"{key} stands for more than {_MOST:,} values by ${{...}}: write them out")
    except RecursionError as error:
        raise InputError("the config's values stand for one another too many times over: write them out") from error


def _keys(node: object) -> list[str]:
    if isinstance(node, Mapping):
        return [str(key) for key in node]
    return [str(i) for i in range(len(node))] if isinstance(node, (list, tuple)) else []


def _way(reference: str, at: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of ${reference}: from the top, or with leading dots from the group in which it stands."""
    path = reference.lstrip(".")
    up = len(reference) - len(path)
    return (*(at[: len(at) - up] if up else ()), *re.split(r"[.\[\]]+", path.rstrip("]")))


def _at(config: object, way: tuple[str, ...]) -> tuple[tuple[str, ...], Any]:
    """The value at a way and the way on which it lies, behind references to whole groups; None where there is none."""
    node = config
    for i, key in enumerate(way):
        if isinstance(node, Mapping):
            node = next((v for k, v in node.items() if str(k) == key), None)
        elif isinstance(node, (list, tuple)):
            node = node[int(key)] if key.isdecimal() and int(key) < len(node) else None
        whole = _REFERENCE.fullmatch(node) if isinstance(node, str) and i + 1 < len(way) else None
        if whole:
            return _at(config, (*_way(whole[1], way[: i + 1]), *way[i + 1 :]))
    return way, node


def used(text: str) -> list[str]:
    """The names of the resolvers that a value calls, also those within another's arguments."""
    if "${" not in text:
        return []
    try:
        trees = [parse(text)]
    except (OmegaConfBaseException, RecursionError):
        return []  # OmegaConf refuses it too when it is resolved
    names = []
    while trees:
        tree = trees.pop()
        if type(tree).__name__ == "InterpolationResolverContext":
            names.append(tree.resolverName().getText())  # pyright: ignore[reportAttributeAccessIssue]
        trees += list(getattr(tree, "children", None) or ())
    return names


def _texts(node: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _texts(value, f"{path}[{i}]")
    elif isinstance(node, str):
        yield path, node

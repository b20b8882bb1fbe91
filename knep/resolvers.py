"""OmegaConf's resolvers in configs: `${oc.env:TOKEN}` in a file would write the reader's secrets to config.yaml.

What a shell fills in on the command line is the user's own doing; a config gets the few resolvers named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from knep.errors import InputError

SAFE = frozenset({"hydra", "now", "oc.select", "oc.dict.keys", "oc.dict.values"})


def check_resolvers(node: Any, allowed: frozenset[str] = SAFE) -> None:
    """Raises InputError naming the first key of an unresolved config whose value calls any other resolver."""
    for path, text in _texts(node, ""):
        for name in used(text):
            if name not in allowed:
                raise InputError(
                    f"{path}={text} calls {name}, and config.yaml would keep what it says: write the value, or let the "
                    f"shell fill it in as in {path}=$VALUE"
                )


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


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _texts(value, f"{path}[{i}]")
    elif isinstance(node, str):
        yield path, node

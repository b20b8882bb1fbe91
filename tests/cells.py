"""Which cells of a long table the plain run has, and which wait for `pytest -m slow`."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).with_name("slow.txt")


def table() -> dict[str, int]:
    """Of tests that take long, `file::name` below tests/ -> how many of its cells the plain run has."""
    rows = [line.split() for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    return {name: int(kept) for name, kept in rows}


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Marks the cells slow that the table leaves out; those that stay are spread evenly over a test's cells."""
    kept, cells, root = table(), defaultdict(list), TABLE.parent
    for item in (item for item in items if item.path.is_relative_to(root)):
        name = f"{item.path.relative_to(root).as_posix()}::{getattr(item, 'originalname', item.name)}"
        if name in kept and item.get_closest_marker("slow") is None:
            cells[name].append(item)
    for name, those in cells.items():
        quick = {i * len(those) // kept[name] for i in range(kept[name])}
        for i, item in enumerate(those):
            if i not in quick:
                item.add_marker(pytest.mark.slow)


def thinned(cells: Iterable[Any], quick: int, *, several: bool = False) -> list[Any]:
    """All cells, in their order; all but `quick` of them, spread evenly over the table, are marked slow.

    several: a cell is the values of several arguments.
    """
    rows = list(cells)
    kept = {i * len(rows) // quick for i in range(quick)}
    slow = {False: (), True: (pytest.mark.slow,)}
    return [pytest.param(*(c if several else (c,)), marks=slow[i not in kept]) for i, c in enumerate(rows)]

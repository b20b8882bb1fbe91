"""Which cells of a long table the plain run has, and which wait for `pytest -m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cells: Iterable[Any], quick: int, *, several: bool = False) -> list[Any]:
    """All cells, in their order; all but `quick` of them, spread evenly over the table, are marked slow.

    several: a cell is the values of several arguments.
    """
    table = list(cells)
    kept = {i * len(table) // quick for i in range(quick)}
    slow = {False: (), True: (pytest.mark.slow,)}
    return [pytest.param(*(c if several else (c,)), marks=slow[i not in kept]) for i, c in enumerate(table)]

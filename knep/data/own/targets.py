"""Cells of target columns to what a task learns: classes, numbers or labels; what does not fit the task is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knep.data.own.read_csv import MISSING, Table, as_list, number, some
from knep.errors import InputError
from knep.utils.text import shown

_CLASSES = 20  # different whole numbers that are taken for classes unasked
_YES = {"1": True, "1.0": True, "true": True, "yes": True, "y": True}
_NO = {"0": False, "0.0": False, "false": False, "no": False, "n": False, "": False}
TASKS = ("multiclass", "binary", "multilabel", "regression")


@dataclass(frozen=True)
class Wanted:
    """What of a table is the target: columns, and what the task learns.

    task: of `TASKS`, or the name of one's own, for which the cells tell; classes: names that are known already;
    categories: columns of numbers that name classes; separator: between the labels in one cell.
    """

    columns: Sequence[str]
    task: str
    classes: Sequence[str] | None = None
    categories: Sequence[str] = ()
    separator: str = ";"


@dataclass(frozen=True)
class Targets:
    """rows: indices (M,) of those that have a target; y: theirs, as `knep.data.base.Arrays` has it; names: of it."""

    rows: Tensor
    y: Tensor
    names: list[str]


def columns_of(target: object) -> list[str]:
    """`data.target=price` or `data.target=[a,b]` as a list. Raises InputError for anything else."""
    names = list(target) if isinstance(target, (list, tuple)) else [target]
    if not names or target is None:
        raise InputError("data.target is missing: write data.target=COLUMN, or [one,two] for several")
    if len({str(n) for n in names}) < len(names) or any(isinstance(n, (dict, list, bool)) or n is None for n in names):
        raise InputError(f"data.target={shown(str(target))} must name columns, each once")
    return [str(name) for name in names]


def read_targets(table: Table, wanted: Wanted, data: str = "data=csv") -> Targets:
    """The targets of a table's rows. Raises InputError, with the task to write, where they do not fit.

    data: what the error calls the data set.
    """
    columns = {name: table.column(name, "data.target") for name in wanted.columns}
    there = [k for k, cells in enumerate(zip(*columns.values(), strict=True)) if not any(c in MISSING for c in cells)]
    task = wanted.task if wanted.task in TASKS else None
    if wanted.task in ("segmentation", "tokens", "tagging"):
        raise InputError(
            f"task={wanted.task} learns other targets than columns: with {data} write task=one of {', '.join(TASKS)}"
        )
    if task == "multilabel":
        return _labels(columns, wanted)
    if not there:
        raise InputError(f"data.target={some(wanted.columns)} is empty in every row: choose another column")
    rows = torch.tensor(there)
    cells = {name: [column[k] for k in there] for name, column in columns.items()}
    several = len(cells) > 1
    if task is None:
        task = "regression" if several or _continuous(next(iter(cells.items())), wanted, table) else "multiclass"
    if task == "regression":
        y = torch.tensor([_numbers(name, column, table) for name, column in cells.items()]).T
        return Targets(rows, y.contiguous() if several else y[:, 0].contiguous(), list(cells))
    if several:
        raise InputError(
            f"task={task} learns one column, and data.target names {len(cells)}: write task=multilabel for columns of "
            "yes and no, or task=regression for numbers"
        )
    (name, column), *_ = cells.items()
    why = _continuous((name, column), wanted, table)
    if why and wanted.classes is None:
        classes = as_list("data.categories", name)
        raise InputError(f"data.target={shown(name)} {why}: write task=regression, or {classes} if they name classes")
    return Targets(rows, *_classes(name, column, wanted, table))


def _continuous(one: tuple[str, Sequence[str]], wanted: Wanted, table: Table) -> str:
    """Why a column is one of numbers to predict; nothing where its cells name classes."""
    name, cells = one
    if name in wanted.categories:
        return ""
    values = [number(cell, table.delimiter != ",") for cell in cells]
    if any(v is None for v in values):
        return ""
    broken = next((cell for cell, v in zip(cells, values, strict=True) if v is not None and v != int(v)), None)
    if broken is not None:
        return f"holds numbers that are no classes, such as {shown(broken)}"
    return f"holds {len(set(values)):,} different numbers" if len(set(values)) > _CLASSES else ""


def _numbers(name: str, cells: Sequence[str], table: Table) -> list[float]:
    values = [number(cell, table.delimiter != ",") for cell in cells]
    wrong = next((cell for cell, v in zip(cells, values, strict=True) if v is None), None)
    if wrong is not None and all(v is None for v in values):
        raise InputError(f"data.target={shown(name)} holds text such as {shown(wrong)[:40]!r}: write task=multiclass")
    if wrong is not None:
        raise InputError(f"data.target={shown(name)} holds {shown(wrong)[:40]!r}, which is no number: mend that row")
    if len(values) > 1 and len(set(values)) == 1:
        raise InputError(f"data.target={shown(name)} is {shown(cells[0])[:40]!r} in every row: choose another column")
    return [float(v) for v in values if v is not None]


def _classes(name: str, cells: Sequence[str], wanted: Wanted, table: Table) -> tuple[Tensor, list[str]]:
    values = [number(cell, table.delimiter != ",") for cell in cells]
    whole = all(v is not None and v == int(v) for v in values)
    named: list[str] = [str(int(v)) for v in values if v is not None] if whole else list(cells)  # 1 and 1.0 are one
    levels: list[Any] = sorted(set(named), key=int) if whole else sorted(set(named))
    known = list(wanted.classes) if wanted.classes is not None else levels
    other = [level for level in levels if level not in set(known)]
    if other:
        raise InputError(
            f"{shown(table.path)} has the class {shown(other[0])[:40]!r} in {shown(name)}, which the training data "
            "have not: leave its rows out"
        )
    if len(known) < 2:
        raise InputError(f"data.target={shown(name)} is {shown(known[0])[:40]!r} in every row: choose another column")
    number_of = {level: k for k, level in enumerate(known)}
    return torch.tensor([number_of[level] for level in named]), known


def _labels(columns: dict[str, list[str]], wanted: Wanted) -> Targets:
    """Of several columns of yes and no, or of one with the names of all labels that hold."""
    (first, cells), *others = columns.items()
    if not others:
        sets = [
            {part.strip() for part in cell.split(wanted.separator)} - {""} if cell not in MISSING else set()
            for cell in cells
        ]
        names = list(wanted.classes) if wanted.classes is not None else sorted(set().union(*sets))
        odd = set().union(*sets) - set(names)
        if odd:
            raise InputError(
                f"data.target={shown(first)} has the label {shown(min(odd))[:40]!r}, which training has not"
            )
        if len(names) < 2:
            raise InputError(
                f"data.target={shown(first)} holds {len(names)} label, of which several are told apart by "
                f"data.separator={wanted.separator!r}: write task=binary, or another separator"
            )
        y = torch.tensor([[name in held for name in names] for held in sets])
        return Targets(torch.arange(len(cells)), y, names)
    rows = []
    for name, column in columns.items():
        said = [_YES.get(c.lower(), _NO.get("" if c in MISSING else c.lower())) for c in column]
        wrong = next((c for c, v in zip(column, said, strict=True) if v is None), None)
        if wrong is not None:
            raise InputError(
                f"data.target={shown(name)} holds {shown(wrong)[:40]!r}: labels are 1 and 0, or yes and no"
            )
        rows.append(said)
    return Targets(torch.arange(len(cells)), torch.tensor(rows).T.contiguous(), list(columns))

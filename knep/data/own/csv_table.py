"""Rows of a table in a text file: numbers and categories made into vectors, split, and fitted on training alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knep.data.base import Arrays, InMemory
from knep.data.own import columns as fitting
from knep.data.own.read_csv import Table, read_csv, some
from knep.data.own.targets import Targets, Wanted, columns_of, read_targets
from knep.data.splits import at_random, stratified, subset
from knep.errors import InputError
from knep.utils.text import shown


class CsvTable(InMemory):
    """A .csv file with names of columns in its first line; x is float32 (N, F), y what the task learns.

    path: the file, under root where that is given; target: a column, or several of numbers or of yes and no;
    task: what is learned, of `knep.data.own.targets.TASKS`; test_path: a file of its own for the test, else test_share
    of all rows, in (0, 1), by class; split_seed: of the test and the validation split. leave_out: columns not to look
    at; categories: columns whose numbers name categories; max_levels: of a category with a column for each; numbers:
    standard or quantile, how columns of numbers are scaled; separator: between labels in one cell; encoding: see
    `knep.data.own.read_csv.ENCODINGS`.
    Raises InputError for a file that is no such table, and for a target that does not fit the task.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        target: str | Sequence[str] | None = None,
        test_path: str | None = None,
        test_share: float = 0.2,
        task: str = "multiclass",
        leave_out: Sequence[str] = (),
        categories: Sequence[str] = (),
        max_levels: int = 32,
        numbers: str = "standard",
        separator: str = ";",
        encoding: str = "utf-8",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not 0 < test_share < 1:
            raise InputError(f"data.test_share={test_share} must be in (0, 1)")
        if not isinstance(max_levels, int) or max_levels < 0:
            raise InputError(f"data.max_levels={max_levels} must be a whole number, at least 0")
        if numbers not in fitting.SCALES:
            raise InputError(f"data.numbers={numbers} must be {' or '.join(fitting.SCALES)}")
        if not isinstance(separator, str) or not separator:
            raise InputError(f"data.separator={separator!r} must be text between two labels, such as ;")
        for name, value in (("leave_out", leave_out), ("categories", categories)):
            if not isinstance(value, (list, tuple)):
                raise InputError(f"data.{name}={value} must be a list of columns: write data.{name}=[{value}]")
        self._path, self._test_path, self._encoding = path, test_path, encoding
        self._target, self._task, self._separator = target, task, separator
        self._test_share, self._max_levels, self._scale = test_share, max_levels, numbers
        self._leave_out, self._categories = [str(n) for n in leave_out], [str(n) for n in categories]
        self.fitted: dict[str, Any] | None = None
        self._classes: list[str] | None = None

    def keep(self, facts: Mapping[str, Any]) -> None:
        self.fitted = checked(facts.get("fitted"))
        if facts.get("target", "class") != "number":
            self._classes = list(facts["class_names"])

    def _file(self, path: str | None, key: str) -> Path:
        if not path or not isinstance(path, str):
            raise InputError(f"data.{key} is missing: write data.{key}=FILE.csv")
        return Path(self.root or "") / Path(path).expanduser()

    def _arrays(self) -> Arrays:
        table = read_csv(self._file(self._path, "path"), self._encoding)
        names = columns_of(self._target)
        for key, listed in (("leave_out", self._leave_out), ("categories", self._categories)):
            for name in listed:
                table.column(name, f"data.{key}")
        wanted = Wanted(names, self._task, self._classes, self._categories, self._separator)
        found = read_targets(table, wanted)
        train, val, test = self._rows(found)
        if self.fitted is None:
            features = [name for name in table.columns if name not in (*names, *self._leave_out)]
            rows = found.rows[train].numpy()
            columns, said = fitting.fit(table, features, rows, self._categories, self._max_levels, self._scale)
            self.fitted = {"columns": columns}
            self._tell(table, found, said)
        x, y = self._encoded(table)[found.rows], found.y
        if self._test_path is None:
            test_x, test_y = x[test], y[test]
        else:
            test_x, test_y = self._own_test(found)
        return Arrays(x[train], y[train], test_x, test_y, found.names, val_x=x[val], val_y=y[val])

    def _encoded(self, table: Table) -> Tensor:
        assert self.fitted is not None
        return torch.from_numpy(fitting.encode(table, self.fitted["columns"]))

    def _own_test(self, found: Targets) -> tuple[Tensor, Tensor]:
        table = read_csv(self._file(self._test_path, "test_path"), self._encoding)
        classes = None if found.y.is_floating_point() else found.names
        wanted = Wanted(columns_of(self._target), self._task, classes, self._categories, self._separator)
        held = read_targets(table, wanted)
        return self._encoded(table)[held.rows], held.y

    def _rows(self, found: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the rows with a target for training, validation and test."""
        y, shares = found.y, [self.val_share]
        if self._test_path is None:
            shares = [self._test_share, self.val_share]
        rest, alone, off = torch.arange(len(y)), torch.arange(0), []
        classes = y.ndim == 1 and not y.is_floating_point()
        if classes:
            few = torch.bincount(y, minlength=len(found.names)) <= len(shares)
            rest, alone = (~few[y]).nonzero().flatten(), few[y].nonzero().flatten()
            if not len(rest):
                raise InputError(
                    f"data.target={shown(str(self._target))} has no class of more than {len(shares)} rows, which "
                    "the splits need: choose another column, or task=regression"
                )
            if len(alone) and self.fitted is None:
                names = [found.names[k] for k in few.nonzero().flatten().tolist()]
                _say(f"classes of too few rows to split are for training alone: {some(names)}")
        elif len(y) <= len(shares):
            raise InputError(
                f"{shown(str(self._path))} has {len(y)} rows with a target: at least {len(shares) + 1} are split"
            )
        for share in shares:
            stay, gone = (
                stratified(y[rest], share, self.split_seed) if classes else at_random(len(rest), share, self.split_seed)
            )
            off.append(rest[gone])
            rest = rest[stay]
        train = torch.cat([rest, alone]).sort().values
        if classes:
            train = train[subset(y[train], self.limit, self.split_seed)]
        elif self.limit is not None and self.limit < len(train):
            train = train[at_random(len(train), 0, self.split_seed, self.limit)[0]]
        return train, off[-1], off[0] if self._test_path is None else off[0][:0]

    def _tell(self, table: Table, found: Targets, said: Sequence[str]) -> None:
        gone = len(table) - len(found.rows)
        rows = f"{len(found.rows):,} rows" + (f", {gone:,} more without a target left out" if gone else "")
        what = (
            "numbers" if found.y.is_floating_point() else f"{len(found.names)} classes or labels: {some(found.names)}"
        )
        _say(f"{shown(table.path.name)}: {rows}; target {some(columns_of(self._target))} ({what}); {said[0]}")
        for line in said[1:]:
            _say(line)


def checked(fitted: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a table's columns. Raises InputError where knep did not write it."""
    wrong = " is missing" if not isinstance(fitted, dict) else fitting.COLUMNS(fitted.get("columns"))
    if wrong:
        raise InputError(f"the checkpoint was not written by knep: fitted.columns{wrong}, give another one")
    return {"columns": list(fitted["columns"])}


def rows_of(path: Path, facts: Mapping[str, Any], encoding: str = "utf-8") -> Tensor:
    """float32 (N, F): the rows of another table, read as the run did whose checkpoint tells these facts.

    Raises InputError for a file that is no table, and for one without a column that the model was trained on.
    """
    columns = checked(facts.get("fitted"))["columns"]
    width = sum(map(fitting.width_of, columns))
    if width != facts["channels"]:
        raise InputError(
            f"the checkpoint was not written by knep: {width} columns do not fit {facts['channels']} inputs"
        )
    return torch.from_numpy(fitting.encode(read_csv(path, encoding), columns))


def _say(line: str) -> None:
    print(f"knep: {line}", file=sys.stderr)

"""Tables in text files (RFC 4180): names in the first line, a row of cells in each other one."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knep.config.budget import check_room
from knep.config.command_line.aliases import quoted
from knep.errors import InputError
from knep.utils.text import shortened, shown

ENCODINGS = ("utf-8", "utf-16", "latin-1", "cp1252")
# What other programs write for a value that is not there.
MISSING = frozenset(("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null", "None", "<NA>", "?"))
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_COST = 15  # bytes in memory for one in the file: cells as text, and the numbers made of them
_COLUMNS = 20_000
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Table:
    """Cells as text by column; delimiter: what stood between them."""

    path: Path
    columns: dict[str, list[str]]
    delimiter: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str, key: str) -> list[str]:
        """The cells of one column. Raises InputError, for the key that named it, where there is none."""
        if name not in self.columns:
            raise InputError(
                f"{key}={shown(name)} is no column of {shown(self.path)}: write one of {some(self.columns)}"
            )
        return self.columns[name]


def read_csv(path: Path, encoding: str = "utf-8") -> Table:
    """The table in a file of comma, semicolon, tab or bar separated cells, which its first line tells.

    encoding: one of `ENCODINGS`. Raises InputError, naming file and line, for a file that is none, is empty or too
    large, has no names, two of one name, or lines of different length, or is not in that encoding.
    """
    if encoding not in ENCODINGS:
        raise InputError(f"data.encoding={encoding} is not read: write one of {', '.join(ENCODINGS)}")
    name = shown(path)
    if path.is_dir():
        raise InputError(f"{name} is a folder: give a .csv file")
    if not path.is_file():
        raise InputError(f"{name} is missing, or no file: give a .csv file")
    check_room(_COST * path.stat().st_size, f"{name} needs", "give a part of it")
    reader: Any = None
    try:
        with open(path, encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="") as file:
            first = file.readline()
            if not first.strip():
                raise InputError(f"{name} is empty: its first line must name the columns")
            delimiter = max(_DELIMITERS, key=_unquoted(first).count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            columns = _columns(name, reader)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not in {encoding} (byte {error.object[error.start]:#x}): save it as UTF-8, or write "
            f"data.encoding={'latin-1' if encoding == 'utf-8' else 'utf-8'}"
        ) from error
    except (OSError, UnicodeError) as error:
        raise InputError(f"{name} cannot be read ({shown(str(error))[:80]}): get the file again") from error
    except csv.Error as error:
        raise InputError(f"{name} is no table: {shown(str(error))[:80]} in line {reader.line_num}") from error
    return Table(path, columns, delimiter)


def _unquoted(line: str) -> str:
    return re.sub(r'"[^"]*"', "", line)


def _columns(name: str, reader: Iterator[list[str]]) -> dict[str, list[str]]:
    names = [cell.strip() for cell in next(reader)]
    if len(names) > _COLUMNS:
        raise InputError(f"{name} has {len(names):,} columns, at most {_COLUMNS:,} are read: leave some out")
    if all(number(cell) is not None for cell in names):
        raise InputError(
            f"{name} begins with numbers ({some(names)}): write the names of the columns in its first line"
        )
    names = [cell or f"column {k}" for k, cell in enumerate(names, start=1)]  # of row numbers, as pandas writes them
    twice = [cell for cell, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{name} has two columns {shown(twice[0])}: rename one of them")
    rows = []
    for row in reader:
        if len(row) != len(names):
            if not row:
                continue
            line = getattr(reader, "line_num", len(rows) + 2)
            raise InputError(
                f"{name} has {len(row)} cells in line {line} and {len(names)} names of columns: mend that line"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{name} has names of columns and no rows")
    return {
        column: [cell.strip() for cell in cells] for column, cells in zip(names, zip(*rows, strict=True), strict=True)
    }


def number(cell: str, comma: bool = False) -> float | None:
    """The number in a cell, None for another or none that is finite; comma: "12,5" is one too."""
    if comma and _DECIMAL_COMMA.fullmatch(cell):
        cell = cell.replace(",", ".")
    if "_" in cell:  # which Python reads, and no other program writes
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if abs(value) < 3.4e38 else None  # also of NaN, and of what float32 has not


def as_list(key: str, name: str) -> str:
    """The override line that gives a list of one column, as a shell takes it."""
    if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        return f"{key}=[{name}]"
    return f'"{key}=[{quoted(shown(name))}]"'


def some(names: Sequence[str] | dict[str, list[str]], most: int = 8) -> str:
    """The first of several names, each fit to print."""
    listed = [shortened(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most:,} more" if len(listed) > most else "")

"""metrics.csv: every logged number of a run, a row per logged step."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from knep.errors import InputError
from knep.io.atomic import write_atomic
from knep.io.schema import MOST
from knep.utils.text import shortened, shown

_FIRST = ("step", "epoch")


class CsvLogger(Logger):
    """Keeps rows in step order and rewrites the file once an epoch; a resumed run goes on in the same file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / "metrics.csv"
        self._rows: dict[int, dict[str, Any]] = {}
        if self._path.is_file():
            self._rows = earlier_rows(self._path)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return "metrics"

    @rank_zero_only
    def log_hyperparams(self, params: object, *_: object, **__: Any) -> None:
        pass  # config.yaml has them

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._rows.setdefault(step or 0, {"step": step or 0}).update(metrics)

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drops what an earlier life of the run logged behind the checkpoint that it resumes from."""
        self._rows = {s: row for s, row in self._rows.items() if s < step}

    @rank_zero_only
    def save(self) -> None:
        if not self._rows:
            return
        names = sorted({k for row in self._rows.values() for k in row} - set(_FIRST))
        text = io.StringIO()
        writer = csv.DictWriter(text, [*_FIRST, *names], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows[s] for s in sorted(self._rows))
        write_atomic(self._path, text.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def earlier_rows(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of an earlier life by their step. Raises InputError for a file that is no such table."""
    damaged = f"{shown(path)} is damaged"
    try:
        with path.open(newline="", encoding="utf-8") as f:
            read = csv.DictReader(f, strict=True)
            rows, names = list(read), read.fieldnames or []
        found = {int(r["step"]): {k: v for k, v in r.items() if v != ""} for r in rows}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{damaged}: remove it to go on without its earlier rows") from error
    if any(None in row or None in row.values() for row in rows):
        raise InputError(f"{damaged}, its rows are not of one length: remove it to go on without them")
    if len(found) < len(rows) or len(set(names)) < len(names) or not all(0 <= step <= MOST for step in found):
        raise InputError(f"{damaged}, a step or a column is there twice or is none: remove it to go on without them")
    odd = next((v for row in found.values() for v in row.values() if not _is_number(v)), None)
    if odd is not None:
        raise InputError(
            f"{damaged}, it holds {shortened(odd)}, which is no number: remove it to go on without its rows"
        )
    return found


def _is_number(value: str) -> bool:
    try:
        return float(value) is not None
    except ValueError:
        return False

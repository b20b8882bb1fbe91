"""metrics.csv: every logged number of a run, a row per logged step."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from knep.files import write_atomic

_FIRST = ("step", "epoch")


class CsvLogger(Logger):
    """Keeps rows in step order and rewrites the file once an epoch; a resumed run goes on in the same file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / "metrics.csv"
        self._rows: dict[int, dict[str, Any]] = {}
        if self._path.is_file():
            with self._path.open(newline="") as f:
                self._rows = {int(r["step"]): {k: v for k, v in r.items() if v != ""} for r in csv.DictReader(f)}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return "metrics"

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
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
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, [*_FIRST, *names], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows[s] for s in sorted(self._rows))
        write_atomic(self._path, text.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

"""A sweep's jobs, one after the other: what became of each, and what is still to do when the same is typed again."""

from __future__ import annotations

import csv
import io
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knep.errors import InputError, RunFailed
from knep.files import write_atomic
from knep.text import console, shown

_ENDED = ("finished", "stopped_early")
_COLUMNS = ("job", "overrides", "status", "val/loss", "val/acc", "folder", "reason")


@dataclass
class Outcomes:
    """Takes down what became of each job; jobs: the override lines of each, in order."""

    jobs: Sequence[Sequence[str]]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def take(self, folder: Path, work: Callable[[], dict[str, Any]]) -> float:
        """Runs one job in `folder`, and returns its validation loss, inf where it has none. Its failure is its own."""
        summary: dict[str, Any]
        try:
            summary = work()
        except (InputError, RunFailed) as error:
            summary = {"status": "refused" if isinstance(error, InputError) else "failed", "reason": str(error)}
        except SystemExit:
            self._add({"status": "interrupted", "folder": str(folder)})
            raise
        except Exception as error:
            traceback.print_exc()
            summary = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        loss = float(summary.get("val/loss", math.inf))
        if summary["status"] in _ENDED and not math.isfinite(loss):
            summary = summary | {"status": "failed", "reason": f"val/loss is {loss}"}
        self._add(summary | {"folder": summary.get("folder", str(folder))})
        return loss if math.isfinite(loss) else math.inf

    @property
    def failed(self) -> int:
        """Jobs that did not end as they should, those that were never begun among them."""
        return len(self.jobs) - sum(row["status"] in _ENDED for row in self.rows)

    def tell(self, folder: Path) -> None:
        """Prints the table of all jobs, and writes it to sweep.csv in the sweep's folder."""
        for _ in range(len(self.jobs) - len(self.rows)):
            self._add({"status": "not begun"})
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows([row.get(c, "") for c in _COLUMNS] for row in self.rows)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "sweep.csv", text.getvalue())
        _print(self.rows)
        if self.failed:
            print(f"knep: {self.failed} of {len(self.jobs)} jobs did not end; the same command again runs only those")

    def _add(self, summary: dict[str, Any]) -> None:
        number = len(self.rows)
        same = set.intersection(*(set(job) for job in self.jobs)) if len(self.jobs) > 1 else set()
        own = " ".join(line for line in self.jobs[number] if line not in same)
        reason = " ".join(str(summary.get("reason", "")).split())
        self.rows.append(summary | {"job": number, "overrides": own, "reason": reason})


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    columns = [c for c in _COLUMNS if any(row.get(c) not in (None, "") for row in rows)]
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        values = (row.get(c, "") for c in columns)
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else shown(str(v)) for v in values))
    # A file has no width: paths in it are whole.
    console(width=None if sys.stdout.isatty() else 300).print(table)

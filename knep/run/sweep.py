"""A sweep's jobs: what became of each, in whatever process it ran, and what is still to do when it is typed again.

Each job writes its own row into the sweep's folder, so that the table is the same under every launcher.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knep.errors import InputError, RunFailed
from knep.io.atomic import write_atomic
from knep.io.lock import held, in_use
from knep.utils.monitors import OF_TASK
from knep.utils.text import console, shown

JOBS = ".jobs"  # in the sweep's folder, until its table is written: the row of each job that was begun
_ENDED = ("finished", "stopped_early")
# What tells epochs apart, of whatever tasks the jobs have; a table has the columns that its jobs fill.
_METRICS = tuple(dict.fromkeys(f"val/{of_task.primary}" for of_task in OF_TASK.values()))
_COLUMNS = ("job", "overrides", "status", "val/loss", *_METRICS, "folder", "reason")


@dataclass(frozen=True)
class Outcomes:
    """Takes down what became of each job of the sweep in `folder`.

    fixed: the keys that every job has from the command line, which no row repeats; planned: the override lines of each
    job, where they are known before.
    """

    folder: Path
    fixed: frozenset[str]
    planned: Sequence[Sequence[str]] = ()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Takes rows within, and those of nobody else. Raises InputError where another sweep is in the folder."""
        place = self.folder / JOBS
        with contextlib.ExitStack() as stack:
            stack.callback(_remove_empty, place)
            try:
                stack.enter_context(held(place))
            except InputError as error:
                raise InputError(str(error).replace("hydra.run.dir", "hydra.sweep.dir")) from None
            for row in self._files():
                row.unlink()
            stack.callback(self._close)
            yield

    def _close(self) -> None:
        """Removes the rows, which sweep.csv has; those of jobs that still run are left."""
        for path in self._files():
            if self._row(path)["status"] != "running":
                path.unlink()

    def take(
        self, number: int, lines: Sequence[str], folder: Path, work: Callable[[Callable[[Path], None]], dict[str, Any]]
    ) -> float:
        """Runs job `number`, and returns its validation loss, inf where it has none. Its failure is its own.

        lines: its overrides; folder: where it runs; work: is given what to call when it runs in another one.
        """
        row: dict[str, Any] = {"lines": list(lines)}

        def runs_in(place: Path) -> None:
            row["folder"] = str(place)
            self._write(number, row | {"status": "running"})

        runs_in(folder)
        summary: dict[str, Any]
        try:
            summary = work(runs_in)
        except (InputError, RunFailed) as error:
            summary = {"status": "refused" if isinstance(error, InputError) else "failed", "reason": str(error)}
        except (SystemExit, KeyboardInterrupt):
            self._write(number, row | {"status": "interrupted"})
            raise
        except Exception as error:
            traceback.print_exc()
            summary = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        loss = float(summary.get("val/loss", math.inf))
        if summary["status"] in _ENDED and not math.isfinite(loss):
            summary = summary | {"status": "failed", "reason": f"val/loss is {loss}"}
        self._write(number, row | {c: summary[c] for c in _COLUMNS if c in summary})
        return loss if math.isfinite(loss) else math.inf

    def _rows(self) -> list[dict[str, Any]]:
        """A row for each job in their order; of those that were planned, also for one that was not begun."""
        begun = [self._row(path) for path in sorted(self._files(), key=lambda path: int(path.stem))]
        left = [list(lines) for lines in self.planned]
        for row in begun:
            if row["lines"] in left:
                left.remove(row["lines"])
        waiting = [{"job": len(begun) + i, "lines": lines, "status": "not begun"} for i, lines in enumerate(left)]
        return [row | {"overrides": " ".join(self.own(row["lines"]))} for row in (*begun, *waiting)]

    @property
    def begun(self) -> bool:
        """Whether any job was."""
        return bool(self._files())

    def tell(self) -> int:
        """Prints the table of all jobs, writes it to sweep.csv, and returns how many did not end as they should."""
        if not self.begun:
            return 0  # Hydra itself was refused
        rows = self._rows()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = _columns(rows)
        writer.writerow(columns)
        writer.writerows([row.get(c, "") for c in columns] for row in rows)
        _print(rows)
        try:
            write_atomic(self.folder / "sweep.csv", text.getvalue())
        except OSError as error:
            print(f"knep: {error.filename} cannot be written ({error.strerror})", file=sys.stderr)
        print(f"look at it: tensorboard --logdir {shlex.quote(str(self.folder))}")
        failed = sum(row["status"] not in _ENDED for row in rows)
        if failed:
            # A sweeper that draws its values may draw others.
            again = "; the same command again runs only those" if self.planned else ""
            print(f"knep: {failed} of {len(rows)} jobs did not end{again}")
        return failed

    def _files(self) -> list[Path]:
        return [path for path in (self.folder / JOBS).glob("*.json") if path.stem.isdecimal()]

    def _write(self, number: int, row: dict[str, Any]) -> None:
        places = self.folder / JOBS
        places.mkdir(parents=True, exist_ok=True)  # a job may outlive the process that began the sweep
        write_atomic(places / f"{number}.json", json.dumps(row))

    def _row(self, path: Path) -> dict[str, Any]:
        row = json.loads(path.read_text(encoding="utf-8")) | {"job": int(path.stem)}
        if row["status"] == "running" and not in_use(Path(row["folder"])):
            row |= {"status": "killed", "reason": "its process is no more"}
        return row | {"reason": " ".join(str(row.get("reason", "")).split())}

    def own(self, lines: Sequence[str]) -> list[str]:
        """The lines that a job does not share with all others; all of them where it shares every one."""
        return [line for line in lines if line.partition("=")[0] not in self.fixed] or list(lines)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those that jobs of these tasks have; val/acc where no job says another metric."""
    there = {c for row in rows for c in _METRICS if c in row} or {"val/acc"}
    return [c for c in _COLUMNS if c not in _METRICS or c in there]


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    columns = [c for c in _columns(rows) if any(row.get(c) not in (None, "") for row in rows)]
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        values = (row.get(c, "") for c in columns)
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else shown(str(v)) for v in values))
    # A file has no width: paths in it are whole.
    console(width=None if sys.stdout.isatty() else 300).print(table)

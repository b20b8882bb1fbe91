"""What a study leaves: report.html (self-contained), effects.csv, results.json, and the table on the screen."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knep.evidence.effects import Records, Row, accuracy, plain
from knep.evidence.stats import Effect
from knep.io.atomic import write_atomic
from knep.io.provenance import commit, hardware
from knep.utils.html_page import html_page
from knep.utils.plotting import svg

_COLUMNS = ("trick", "compared", "test accuracy", "steps to target", "time", "memory", "p (Holm)", "verdict")


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table as text."""
    steps = "" if row.steps is None else _with(row.steps, 1, "{:+.0f}")
    steps += f", {row.unreached} of {row.n} never" if row.unreached else ""
    return (
        f"{row.slot}={row.option}",
        row.kind,
        _with(row.accuracy, 100, "{:+.2f}"),
        steps,
        f"x{row.time:.2f}",
        f"x{row.memory:.2f}",
        f"{row.corrected_p:.3f}",
        row.verdict,
    )


def _with(effect: Effect, scale: float, form: str) -> str:
    mean, low, high = (form.format(scale * v) for v in (effect.mean, effect.low, effect.high))
    return f"{mean} [{low}, {high}]"


def show(rows: Sequence[Row]) -> None:
    """The table on the screen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, cells(row)))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file has room
    console.print(table)


def results(
    title: str,
    command: str,
    rows: Sequence[Row],
    records: Records,
    classes: int,
    target: float | None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    arms = {
        name: {
            "test_acc": [accuracy(r, classes) for r in by_seed.values()],
            "seeds": list(by_seed),
            "status": [r["status"] for r in by_seed.values()],
            "reasons": sorted({r["reason"] for r in by_seed.values() if r.get("reason")}),
            "cpu_seconds": [r.get("cpu_seconds") for r in by_seed.values()],
            "reads_of_test": [r.get("sealed", 0) for r in by_seed.values()],
            "command": "python train.py " + " ".join(next(iter(by_seed.values()))["overrides"]),
        }
        for name, by_seed in records.items()
    }
    return {
        "title": title,
        "command": command,
        "commit": commit(),
        "hardware": hardware(),
        "target": target,
        "arms": arms,
        "effects": plain(rows),
        **(more or {}),
    }


def write(folder: Path, found: Mapping[str, Any], rows: Sequence[Row], figures: Mapping[str, Any]) -> Path:
    """report.html, effects.csv and results.json in `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "results.json", json.dumps(found, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(cells(row) for row in rows)
    write_atomic(folder / "effects.csv", text.getvalue())
    write_atomic(folder / "report.html", page(found, rows, figures))
    return folder / "report.html"


_STYLE = (
    "table{border-collapse:collapse;width:100%;font-size:14px}td,th{padding:.25rem .6rem;text-align:left;"
    "border-bottom:1px solid #ddd}code{background:#f4f4f4;padding:.1rem .3rem}svg{max-width:100%;height:auto}"
    ".helps{color:#187a2f}.hurts{color:#b3261e}.warn{background:#fff3cd;padding:.5rem 1rem}"
)


def page(found: Mapping[str, Any], rows: Sequence[Row], figures: Mapping[str, Any]) -> str:
    """The report as one HTML page without any link to the outside. Whatever comes from a config is escaped."""
    e = html.escape
    twice = [name for name, arm in found["arms"].items() if max(arm["reads_of_test"]) > 1]
    failed = {name: arm["reasons"] for name, arm in found["arms"].items() if arm["reasons"]}
    parts = [f"<h1>{e(found['title'])}</h1>", f"<p><code>{e(found['command'])}</code><br>{e(found['hardware'])}"]
    parts.append(f"<br>commit {e(found['commit'] or 'none')}</p>")
    if twice:
        parts.append(f'<p class="warn">The test split was read more than once by: {e(", ".join(twice))}.</p>')
    for name, reason in found.get("refused", {}).items():
        parts.append(f'<p class="warn">Refused, {e(name)}: {e(reason)}</p>')
    for name, reasons in failed.items():
        parts.append(f'<p class="warn">Failed trials of {e(name)}: {e("; ".join(reasons))}</p>')
    if rows:
        parts.append("<table><tr>" + "".join(f"<th>{e(c)}</th>" for c in _COLUMNS) + "</tr>")
        for row in rows:
            kind = row.verdict.split(",")[0].replace(" ", "-")
            parts.append(f'<tr class="{e(kind)}">' + "".join(f"<td>{e(c)}</td>" for c in cells(row)) + "</tr>")
        parts.append("</table>")
        if found["target"] is not None:
            parts.append(f"<p>Steps to {100 * found['target']:.2f} % validation accuracy; negative means sooner.</p>")
        parts.append(
            "<p>Paired differences over the same seeds, mean and 95 % interval by Student's t; accuracy in points. "
            "p is corrected for the number of rows (Holm). A failed trial counts with the accuracy of guessing.</p>"
        )
    for title, figure in figures.items():
        parts += [f"<h2>{e(title)}</h2>", svg(figure)]
    parts.append("<h2>Arms</h2><table><tr><th>arm</th><th>test accuracy by seed</th><th>command</th></tr>")
    for name, arm in found["arms"].items():
        numbers = ", ".join(f"{100 * a:.2f}" for a in arm["test_acc"])
        parts.append(f"<tr><td>{e(name)}</td><td>{numbers}</td><td><code>{e(arm['command'])}</code></td></tr>")
    return html_page(found["title"], _STYLE, [*parts, "</table>"])

"""What a study leaves: report.html (self-contained), effects.csv, results.json, and the table on the screen."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from knep.evidence.effects import Metric, Records, Row, plain, tested
from knep.evidence.stats import LEAST_PAIRS, Effect
from knep.io.atomic import write_atomic
from knep.io.provenance import commit, hardware
from knep.utils.pages import html_page, svg


def columns(metric: Metric) -> tuple[str, ...]:
    """The names of what `cells` gives."""
    effect = f"test {metric.said}" + ("" if metric.mode == "max" else f" ({metric.unit})")
    return "trick", "compared", "n", effect, "steps to target", "time", "memory", "p (Holm)", "p (signs)", "verdict"


def cells(row: Row, metric: Metric) -> tuple[str, ...]:
    """One row of the table as text."""
    steps = "" if row.steps is None else _with(row.steps, "{:+.0f}".format)
    return (
        f"{row.slot}={row.option}",
        row.kind,
        str(row.n),
        _with(row.effect, partial(metric.text, signed=True)),
        steps or never(row.unreached, row.control_unreached, row.n),
        f"x{row.time:.2f}",
        f"x{row.memory:.2f}",
        f"{row.corrected_p:.3f}",
        f"{row.effect.p_flip:.3f}",
        row.verdict,
    )


def never(with_trick: int, without: int | None, n: int) -> str:
    """How many of the runs with a trick and of those without it (None: unknown) never reached the target."""
    sides = ((with_trick, "with"), (without, "without"))
    said = [f"{k} of {n} {side}" for k, side in sides if k]
    unknown = ["without unknown"] if without is None else []
    return f"never: {', '.join(said + unknown)}" if said or unknown else ""


def _with(effect: Effect, text: Callable[[float], str]) -> str:
    mean, low, high = map(text, (effect.mean, effect.low, effect.high))
    return f"{mean} [{low}, {high}]"


def show(rows: Sequence[Row], metric: Metric) -> None:
    """The table on the screen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in columns(metric):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, cells(row, metric)))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file has room
    console.print(table)


def results(
    title: str,
    command: str,
    rows: Sequence[Row],
    records: Records,
    metric: Metric,
    target: float | None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    arms = {
        name: {
            f"test_{metric.name}": [tested(r, metric) for r in by_seed.values()],
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
        "metric": {"name": metric.name, "mode": metric.mode},
        "target": target,
        "arms": arms,
        "effects": plain(rows),
        **(more or {}),
    }


def write(
    folder: Path, found: Mapping[str, Any], rows: Sequence[Row], figures: Mapping[str, Any], metric: Metric
) -> Path:
    """report.html, effects.csv and results.json in `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "results.json", json.dumps(found, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns(metric))
    writer.writerows(cells(row, metric) for row in rows)
    write_atomic(folder / "effects.csv", text.getvalue())
    write_atomic(folder / "report.html", page(found, rows, figures, metric))
    return folder / "report.html"


_STYLE = (
    "table{border-collapse:collapse;width:100%;font-size:14px}td,th{padding:.25rem .6rem;text-align:left;"
    "border-bottom:1px solid #ddd}code{background:#f4f4f4;padding:.1rem .3rem}svg{max-width:100%;height:auto}"
    ".helps{color:#187a2f}.hurts{color:#b3261e}.warn{background:#fff3cd;padding:.5rem 1rem}"
)


def page(found: Mapping[str, Any], rows: Sequence[Row], figures: Mapping[str, Any], metric: Metric) -> str:
    """The report as one HTML page without any link to the outside. Whatever comes from a config is escaped."""
    e = html.escape
    twice = [name for name, arm in found["arms"].items() if max(arm["reads_of_test"]) > 1]
    failed = {name: arm["reasons"] for name, arm in found["arms"].items() if arm["reasons"]}
    parts = [f"<h1>{e(found['title'])}</h1>", f"<p><code>{e(found['command'])}</code><br>{e(found['hardware'])}"]
    parts.append(f"<br>commit {e(found['commit'] or 'none')}</p>")
    if found.get("question"):
        parts.append(f"<p>{e(found['question'])}</p>")
    if twice:
        parts.append(f'<p class="warn">The test split was read more than once by: {e(", ".join(twice))}.</p>')
    for name, reason in found.get("refused", {}).items():
        parts.append(f'<p class="warn">Refused, {e(name)}: {e(reason)}</p>')
    for name, reasons in failed.items():
        parts.append(f'<p class="warn">Failed trials of {e(name)}: {e("; ".join(reasons))}</p>')
    percent = " %" if metric.mode == "max" else ""
    if rows:
        parts.append("<table><tr>" + "".join(f"<th>{e(c)}</th>" for c in columns(metric)) + "</tr>")
        for row in rows:
            kind = row.verdict.split(",")[0].replace(" ", "-")
            parts.append(f'<tr class="{e(kind)}">' + "".join(f"<td>{e(c)}</td>" for c in cells(row, metric)) + "</tr>")
        parts.append("</table>")
        if found["target"] is not None:
            reached = f"{metric.text(found['target'])}{percent}"
            parts.append(f"<p>Steps to a validation {metric.said} of {reached}; negative means sooner.</p>")
        counts = "accuracy of guessing" if metric.name == "acc" else f"worst {metric.said} of those that ended"
        parts.append(
            f"<p>Paired differences over the same seeds, mean and 95 % interval by Student's t; {metric.said}: "
            f"{metric.unit}. p is of Student's t, corrected for the number of rows (Holm); of the sign-flip test as it "
            f"is. A verdict takes both, and {LEAST_PAIRS} pairs. A failed trial counts with the {counts}. Where a run "
            "never reaches the target there is no difference of steps, and how many do not is said instead.</p>"
        )
    for title, figure in figures.items():
        parts += [f"<h2>{e(title)}</h2>", svg(figure)]
    parts.append(f"<h2>Arms</h2><table><tr><th>arm</th><th>test {e(metric.said)} by seed</th><th>command</th></tr>")
    for name, arm in found["arms"].items():
        numbers = ", ".join(map(metric.text, arm[f"test_{metric.name}"]))
        parts.append(f"<tr><td>{e(name)}</td><td>{numbers}</td><td><code>{e(arm['command'])}</code></td></tr>")
    return html_page(found["title"], _STYLE, [*parts, "</table>"])

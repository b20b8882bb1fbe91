"""README's table of effects: of each slot the best and the worst of all that the ledger has measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knep.config.catalog import SLOTS, cells

START, END = "<!-- effects -->", "<!-- /effects -->"
_HEAD = "| slot | measured | best | worst |\n|---|---|---|---|"


def table() -> str:
    """A row per slot with a measured effect, in points of test accuracy; to leave a slot out is no trick."""
    rows = [_HEAD]
    for slot in SLOTS:
        known = [cell for cell in cells(slot) if cell.get("effect") and cell["option"] != "none"]
        known.sort(key=lambda cell: (-cell["effect"]["accuracy"]["mean"], cell["workload"], cell["option"]))
        if known:
            worst = _said(slot, known[-1]) if len(known) > 1 else ""
            rows.append(f"| `{slot}` | {len(known)} | {_said(slot, known[0])} | {worst} |")
    return "\n".join(rows)


def filled(text: str) -> str:
    """A page with the table between its marks, as it should be; one without marks as it is."""
    head, found, rest = text.partition(START)
    _, ended, tail = rest.partition(END)
    return f"{head}{START}\n{table()}\n{END}{tail}" if found and ended else text


def _said(slot: str, cell: Mapping[str, Any]) -> str:
    effect = cell["effect"]
    mean, low, high = (f"{100 * effect['accuracy'][key]:+.2f}" for key in ("mean", "low", "high"))
    link = f"[`{cell['option']}`](docs/cards/{slot}/{cell['option']}.md)"
    return f"{link} on {cell['workload']}: {mean} [{low}, {high}], n = {cell['n']}, {effect['verdict']}"

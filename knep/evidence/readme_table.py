"""What is generated outside of the cards: README's tables and the recipes' heads, by `knep cards --readme`.

README's slots come from the YAML files, its evidence and the heads from docs/evidence, its effects from the ledger: of
each slot the best and the worst of all that was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knep.config.catalog import CONF, GROUPS, SLOTS, cells, options
from knep.errors import InputError, RunFailed
from knep.io.atomic import write_atomic

START, END = "<!-- effects -->", "<!-- /effects -->"
_EVIDENCE = Path("docs") / "evidence"
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


def _slots() -> str:
    return "\n".join(f"| `{group}` | {', '.join(f'`{o}`' for o in options(group))} |" for group in GROUPS)


def _evidence(root: Path) -> str:
    """A row per measurement: command, n, mean and deviation of the test accuracy, seconds."""
    rows = ["| command | n | test accuracy | seconds a run |", "|---|---|---|---|"]
    for path in sorted((root / _EVIDENCE).glob("*.json")):
        m = json.loads(path.read_text(encoding="utf-8"))
        spread = f" ± {m['test_acc_std']:.2%}" if m["test_acc_std"] is not None else ""
        accuracy = f"{m['test_acc_mean']:.2%}{spread}"
        rows.append(f"| `{m['command']}` | {m['n']} | {accuracy} | {m['seconds_mean']:.0f} |")
    return "\n".join(rows)


def _whole(text: str, root: Path) -> str:
    """README with all its generated parts as they should be."""
    for name, content in (("slots", _slots()), ("evidence", _evidence(root))):
        head, rest = text.split(f"<!-- {name} -->")
        _, tail = rest.split(f"<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{content}\n<!-- /{name} -->{tail}"
    return filled(text)


def _minutes(measured: dict[str, Any]) -> str:
    """How long a run takes: in processor time where it was measured, which other work on the machine hardly changes."""
    if "cpu_seconds_mean" in measured:
        return f"{measured['cpu_seconds_mean'] / 60:.1f} CPU min"
    return f"{measured['seconds_mean'] / 60:.1f} min"


def _headed(recipe: str, text: str, root: Path) -> str:
    """A recipe's file with its third line, the command and what it gave, as the evidence has it."""
    measured = root / _EVIDENCE / f"{recipe}.json"
    line = f"# python train.py recipe={recipe}: not measured yet."
    if measured.is_file():
        m = json.loads(measured.read_text(encoding="utf-8"))
        line = (
            f"# {m['command']}: test accuracy {100 * m['test_acc_mean']:.2f} % ± {100 * m['test_acc_std']:.2f} % "
            f"(n = {m['n']}, {_minutes(m)})."
        )
    lines = text.splitlines()
    return "\n".join([*lines[:2], line, *lines[3:]]) + "\n"


def generated() -> dict[Path, str]:
    """Each file with generated parts, as it should be. Raises InputError outside of a clone, which alone has them."""
    root = Path(__file__).resolve().parents[2]
    page = root / "README.md"
    if not (page.is_file() and (root / _EVIDENCE).is_dir()):
        raise InputError("knep cards --readme fills README.md and the recipes' heads of a clone: run the knep of one")
    recipes = {path: path.read_text(encoding="utf-8") for path in sorted((CONF / "recipe").glob("*.yaml"))}
    return {page: _whole(page.read_text(encoding="utf-8"), root)} | {
        path: _headed(path.stem, text, root) for path, text in recipes.items()
    }


def readme(write: bool) -> None:
    """`knep cards --readme [--write]`: names the files that are out of date, or writes them.

    Raises RunFailed where one is out of date and not written.
    """
    stale = {path: text for path, text in generated().items() if path.read_text(encoding="utf-8") != text}
    names = ", ".join(path.name for path in stale)
    if stale and not write:
        raise RunFailed(f"{names} out of date: knep cards --readme --write")
    for path, text in stale.items():
        write_atomic(path, text)
    print(f"{names} written" if stale else "README.md and the recipes' heads are up to date")

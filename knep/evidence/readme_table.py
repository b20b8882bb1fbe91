"""What is generated outside of the cards: README's tables and the recipes' heads, by `knep cards --readme`.

README's slots come from the YAML files, its evidence and the heads from docs/evidence, its effects from the ledger:
the tricks that ledger.yaml names, whatever came of them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from knep.config.catalog import CONF, GROUPS, options
from knep.errors import InputError, RunFailed
from knep.evidence.meta.random_effects import Pooled
from knep.evidence.meta.verdicts import CORRECTION, Cells, count, pooled, spec, stored
from knep.evidence.stats import LEVEL, VERDICTS, holm
from knep.io.atomic import write_atomic

START, END = "<!-- effects -->", "<!-- /effects -->"
_EVIDENCE = Path("docs") / "evidence"
_HEAD = (
    "| trick | against | workloads | error removed | on a new problem | between workloads | verdicts |\n"
    "|---|---|---|---|---|---|---|"
)


def table() -> str:
    """A row per trick that README shows and that was measured on three workloads or more."""
    ledger = stored()
    named = [(slot, option) for slot, some in spec()["shown"].items() for option in some]
    known = {name: found for name in named if (found := pooled(*name, ledger)) is not None}
    rows = [_row(*name, found, ledger) for name, found in known.items()]
    sure = sum(p < 1 - LEVEL for p in holm([found.p for found in known.values()]))
    after = (
        f"After {CORRECTION} over these {len(known)} rows, {sure} of the means differ from 0 at 5 %; the verdicts are "
    )
    after += f"those of single workloads, after {CORRECTION} over all {count(ledger)} effects of the ledger."
    return "\n".join([_HEAD, *rows, "", after])


def _row(slot: str, option: str, found: Pooled, ledger: Cells) -> str:
    own = [c for c in ledger[slot] if c["option"] == option and c.get("effect") and not c.get("against")]
    said = Counter(c["effect"]["verdict"].split(",")[0] for c in own)
    words = [
        f"[`{slot}={option}`](docs/cards/{slot}/{option}.md)",
        f"`{own[0]['control']}`",
        str(found.workloads),
        share(found.mean, found.low, found.high),
        share(None, found.new_low, found.new_high),
        f"{found.i2:.0%}",
        ", ".join(f"{said[name]} {name}" for name in VERDICTS if said[name]),
    ]
    return f"| {' | '.join(words)} |"


def share(mean: float | None, low: float, high: float) -> str:
    """A share of an error with its interval, in per cent; of which more than all cannot be removed."""
    told = f"[{100 * low:+.0f}, {min(100.0, 100 * high):+.0f}] %"
    return told if mean is None else f"{100 * mean:+.0f} {told}"


def filled(text: str) -> str:
    """A page with the table between its marks, as it should be; one without marks as it is."""
    head, found, rest = text.partition(START)
    _, ended, tail = rest.partition(END)
    return f"{head}{START}\n{table()}\n{END}{tail}" if found and ended else text


def _slots() -> str:
    return "\n".join(f"| `{group}` | {', '.join(f'`{o}`' for o in options(group))} |" for group in GROUPS)


def _evidence(root: Path) -> str:
    """A row per measurement: command, n, mean and deviation of the test accuracy, which weights, seconds, by what."""
    rows = [
        "| command | n | test accuracy | weights tested | seconds a run | commit, torch, precision |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((root / _EVIDENCE).glob("*.json")):
        m = json.loads(path.read_text(encoding="utf-8"))
        spread = f" ± {m['test_acc_std']:.2%}" if m["test_acc_std"] is not None else ""
        accuracy = f"{m['test_acc_mean']:.2%}{spread}"
        by = ", ".join(m.get(key) or "unknown" for key in ("commit", "torch", "precision"))
        by = "unknown" if set(by.split(", ")) == {"unknown"} else by
        words = [f"`{m['command']}`", str(m["n"]), accuracy, m["tested"], f"{m['seconds_mean']:.0f}", by]
        rows.append(f"| {' | '.join(words)} |")
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

"""Fills what is generated: README's slots from the YAML files, its evidence and the recipes' heads from docs/evidence.

`python scripts/readme.py` names the files that are out of date and exits with 1; `--write` writes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from knep.config.catalog import CONF, GROUPS, options
from knep.evidence import readme_table

ROOT = Path(__file__).parent.parent


def slots() -> str:
    return "\n".join(f"| `{group}` | {', '.join(f'`{o}`' for o in options(group))} |" for group in GROUPS)


def evidence() -> str:
    """A row per measurement: command, n, mean and deviation of the test accuracy, seconds."""
    rows = ["| command | n | test accuracy | seconds a run |", "|---|---|---|---|"]
    for path in sorted((ROOT / "docs" / "evidence").glob("*.json")):
        m = json.loads(path.read_text())
        spread = f" ± {m['test_acc_std']:.2%}" if m["test_acc_std"] is not None else ""
        accuracy = f"{m['test_acc_mean']:.2%}{spread}"
        rows.append(f"| `{m['command']}` | {m['n']} | {accuracy} | {m['seconds_mean']:.0f} |")
    return "\n".join(rows)


def filled(text: str) -> str:
    """README with its generated parts as they should be."""
    for name, content in (("slots", slots()), ("evidence", evidence())):
        head, rest = text.split(f"<!-- {name} -->")
        _, tail = rest.split(f"<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{content}\n<!-- /{name} -->{tail}"
    return readme_table.filled(text)


def _minutes(measured: dict[str, Any]) -> str:
    """How long a run takes: in processor time where it was measured, which other work on the machine hardly changes."""
    if "cpu_seconds_mean" in measured:
        return f"{measured['cpu_seconds_mean'] / 60:.1f} CPU min"
    return f"{measured['seconds_mean'] / 60:.1f} min"


def headed(recipe: str, text: str) -> str:
    """A recipe's file with its third line, the command and what it gave, as the evidence has it."""
    measured = ROOT / "docs" / "evidence" / f"{recipe}.json"
    line = f"# python train.py recipe={recipe}: not measured yet."
    if measured.is_file():
        m = json.loads(measured.read_text())
        line = (
            f"# {m['command']}: test accuracy {100 * m['test_acc_mean']:.2f} % ± {100 * m['test_acc_std']:.2f} % "
            f"(n = {m['n']}, {_minutes(m)})."
        )
    lines = text.splitlines()
    return "\n".join([*lines[:2], line, *lines[3:]]) + "\n"


def generated() -> dict[Path, str]:
    """Each file with generated parts, as it should be."""
    readme = ROOT / "README.md"
    recipes = {path.stem: path for path in sorted((CONF / "recipe").glob("*.yaml"))}
    return {readme: filled(readme.read_text())} | {
        path: headed(name, path.read_text()) for name, path in recipes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    stale = {path: text for path, text in generated().items() if path.read_text() != text}
    if parser.parse_args().write:
        for path, text in stale.items():
            path.write_text(text)
    elif stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        raise SystemExit(f"{names} out of date: python scripts/readme.py --write")


if __name__ == "__main__":
    main()

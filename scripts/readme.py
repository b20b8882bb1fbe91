"""Fills README's generated parts: the slots from the YAML files, the evidence from docs/evidence/*.json.

`python scripts/readme.py` prints what differs and exits with 1; `--write` writes it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from knep.listing import GROUPS, options

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
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text()
    if parser.parse_args().write:
        readme.write_text(filled(text))
    elif filled(text) != text:
        raise SystemExit("README.md is out of date: python scripts/readme.py --write")


if __name__ == "__main__":
    main()

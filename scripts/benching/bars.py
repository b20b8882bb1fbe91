"""What the bench is held against, and the page that it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OVER_HAND = {
    "mlp_64": 0.93,
    "cnn_512": 0.98,
    "resnet20_128": 0.98,
    "resnet18_128": 0.98,
    "inception_128": 0.98,
}
OVER_USUAL = {"mlp_64": 4.5, "cnn_512": 2.8, "resnet20_128": 2.5}
MEMORY = 1.15
ACCURACY = 0.4  # points
STARTUP = {"help": 0.3, "cfg": 1.0, "ratio": 1.2}

Row = tuple[str, str, float, bool]


def rows(kind: str, found: dict[str, Any]) -> Iterator[Row]:
    """(what, bar, measured, passed) for each bar that these measurements speak to."""
    if kind == "steps":
        for who, bars in (("hand", OVER_HAND), ("usual", OVER_USUAL)):
            for case, bar in bars.items():
                if case in found and who in found[case]["ratio"]:
                    value = found[case]["ratio"][who]["median"]
                    yield f"knep over {who}, {case}", f">= {bar}", value, value >= bar
    if kind == "memory":
        for case, values in found.items():
            yield f"peak memory over hand, {case}", f"<= {MEMORY}", values["ratio"], values["ratio"] <= MEMORY
    if kind == "accuracy":
        for case, values in found.items():
            worst = max(abs(values["low"]), abs(values["high"]))
            yield f"accuracy against usual, {case}", f"95 % within {ACCURACY} points", worst, worst <= ACCURACY
    if kind == "startup":
        for name, bar in STARTUP.items():
            yield f"start: {name}", f"<= {bar}", found[name], found[name] <= bar


def table(kind: str, found: dict[str, Any]) -> str:
    """The bars as a Markdown table."""
    lines = ["| what | bar | measured | |", "|---|---|---|---|"]
    for what, bar, value, passed in rows(kind, found):
        lines.append(f"| {what} | {bar} | {value:.3f} | {'pass' if passed else 'short'} |")
    return "\n".join(lines)


def page(folder: Path) -> str:
    """docs/performance.md, from the JSON files of the bench."""
    parts = [
        "# Performance",
        "",
        "Written by `python scripts/bench.py report` from the measurements of `scripts/bench.py`; do not edit.",
        "Contenders take turns in one process; a ratio is the median over neighbouring runs, with the lowest and the",
        "highest in brackets, and beside it the ratio of processor time, which a busy machine disturbs less.",
    ]
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        where = ", ".join(f"{k} {v}" for k, v in stored["where"].items())
        parts += ["", f"## {stored['kind']}", "", f"`{stored['command']}`: {where}.", ""]
        if stored["kind"] in ("steps", "peers"):
            parts += [*_rates(stored["found"]), ""]
        parts.append(table(stored["kind"], stored["found"]) if stored["kind"] != "peers" else "")
    return "\n".join(parts).rstrip() + "\n"


def _rates(found: dict[str, Any]) -> Iterator[str]:
    yield "| case | samples/s | knep over |"
    yield "|---|---|---|"
    for case, values in found.items():
        rates = ", ".join(f"{who} {rate:,.0f}" for who, rate in values["samples_per_second"].items())
        ratios = ", ".join(
            f"{who} {r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}], processor time {r['cpu']:.2f}"
            for who, r in values["ratio"].items()
        )
        yield f"| {case} | {rates} | {ratios} |"

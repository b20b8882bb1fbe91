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
RACE = 5.0
MEMBERS = {"mlp_64": 3.0}
IMAGES = {"knep decoded": 1.5, "knep cached": 5.0}  # images/s over those of timm's loader
COST = 0.02
EVERY = 200  # steps from one checkpoint to the next, for which the cost of saving is given
OVERHEAD = {
    "guard": "what the guard adds",
    "saving": f"what checkpoint.every={EVERY} adds",
    "doctor": "what callbacks=doctor adds",
}
COSTS = {"doctor": 0.03}
STARTUP = {"help": 0.3, "cfg": 1.0, "ratio": 1.2}

Row = tuple[str, str, str, str]


def rows(kind: str, found: dict[str, Any]) -> Iterator[Row]:
    """(what, bar, measured, verdict) for each bar that these measurements speak to."""
    if kind == "steps":
        for who, bars in (("hand", OVER_HAND), ("usual", OVER_USUAL)):
            for case, bar in bars.items():
                if case in found and who in found[case]["ratio"]:
                    ratio = found[case]["ratio"][who]
                    measured = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
                    spans = ratio["low"] < bar <= ratio["high"]
                    verdict = _verdict(ratio["median"] >= bar) + (
                        ", undecided: the runs lie on both sides" if spans else ""
                    )
                    yield f"knep over {who}, {case}", f">= {bar}", measured, verdict
    if kind == "memory":
        for case, values in found.items():
            added = ", ".join(f"{who} {mib:.0f}" for who, mib in values["added"].items())
            verdict = _verdict(values["ratio"] <= MEMORY)
            if not all(values["added"][who] > 0 for who in ("knep", "hand")):
                verdict += ", but training stayed below the peak of the imports and the reading"
            measured = f"{values['ratio']:.3f} (MiB over the peak before training: {added})"
            yield f"peak memory over hand, {case}", f"<= {MEMORY}", measured, verdict
    if kind == "accuracy":
        for case, values in found.items():
            worst = max(abs(values["low"]), abs(values["high"]))
            measured = f"{values['difference']:.2f} [{values['low']:.2f}, {values['high']:.2f}]"
            yield f"accuracy against usual, {case}", f"within {ACCURACY} points", measured, _verdict(worst <= ACCURACY)
    if kind == "race":
        fast, plain = found["fast"], found["plain"]
        reached = fast["test"] >= found["aim"]
        measured = f"{fast['test']:.2%} in {fast['seconds']:.0f} s (n = {fast['n']})"
        yield "fashion_speedrun, mean test accuracy", f">= {found['aim']:.1%}", measured, _verdict(reached)
        measured = f"{found['ratio']:.2f} ({plain['seconds']:.0f} s to {plain['test']:.2%}, n = {plain['n']})"
        verdict = _verdict(reached and found["ratio"] >= RACE)
        yield "plain Adam to its best over fashion_speedrun, time", f">= {RACE}", measured, verdict
        shared = found.get("shared")
        if shared:
            what = f"the same, both to plain Adam's best validation accuracy, {shared['val']:.2%}"
            yield what, "", f"{shared['ratio']:.2f} ({plain['seconds']:.0f} s and {shared['seconds']:.0f} s)", ""
    if kind in OVERHEAD:
        for case, values in found.items():
            measured = f"{values['cpu']:.1%} of processor time, {values['cpu_fastest']:.1%} between the fastest runs"
            measured += f", over {values['steps']} steps" if "steps" in values else ""
            measured += f", saved every {values['every']} and scaled" if values.get("every", EVERY) < EVERY else ""
            bar = COSTS.get(kind, COST)
            yield f"{OVERHEAD[kind]}, {case}", f"<= {bar:.0%}", measured, _verdict(values["cpu"] <= bar)
    if kind == "members":
        for case, values in found.items():
            for way, ratio in values["ratio"].items():
                measured = f"{ratio['median']} [{ratio['low']}, {ratio['high']}], processor time {ratio['cpu']}"
                aim = MEMBERS.get(case) if way == "one pass" else None
                what = f"{values['members']} members {way} over single runs, {case}"
                yield what, f">= {aim}" if aim else "", measured, _verdict(ratio["median"] >= aim) if aim else ""
    if kind == "startup":
        for name, bar in STARTUP.items():
            yield f"start: {name}", f"<= {bar}", f"{found[name]:.3f}", _verdict(found[name] <= bar)


def _verdict(passed: bool) -> str:
    return "pass" if passed else "short"


def table(kind: str, found: dict[str, Any]) -> str:
    """The bars as a Markdown table."""
    lines = ["| what | bar | measured | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(kind, found)]
    return "\n".join(lines)


def page(folder: Path, earlier: str = "") -> str:
    """docs/performance.md, from the JSON files of the bench; sections that have none are those of the earlier page."""
    parts = [
        "# Performance",
        "",
        "Written by `python -m scripts.bench report` from the measurements of `scripts/bench`; do not edit.",
        "Contenders take turns, in steps and peers in a process each; a ratio is the median over neighbouring runs,",
        "with the lowest and the highest in brackets, and beside it the ratio of processor time, which a busy machine",
        "disturbs less. The load is that of the machine when a measurement ended: above the number of cores it was",
        "shared with other work. The hand-written loop uses knep's model, scaling, parameter groups and freed memory;",
        "the usual set-up loads in the main process (`num_workers=0`, Lightning's and PyTorch's default).",
        "",
        "A run says in one line which levers it uses; each is an override: `trainer.precision=32-true`,",
        "`channels_last=false`, `optimizer.fused=false`, `keep_memory=false`, `lean=false`, `compile=true`.",
    ]
    sections = _sections(earlier)
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        sections[path.stem] = "\n".join(_section(path.stem, stored)).strip()
    for name, text in sorted(sections.items()):
        parts += ["", f"## {name}", "", text]
    return "\n".join(parts).rstrip() + "\n"


def _sections(page: str) -> dict[str, str]:
    """What a page says under each of its headings."""
    found = (part.partition("\n") for part in f"\n{page}".split("\n## ")[1:])
    return {name.strip(): text.strip() for name, _, text in found}


def _section(kind: str, stored: dict[str, Any]) -> Iterator[str]:
    if kind == "images":
        yield from _images(stored)
        return
    yield f"`{stored['command']}`: {', '.join(f'{k} {v}' for k, v in stored['where'].items())}."
    yield ""
    if kind in ("steps", "peers"):
        yield from _rates(stored["found"])
        yield ""
    if kind == "race":
        runs = " and ".join(f"`{command}`" for command in stored["found"]["commands"])
        yield from (f"Of the runs of {runs}.", "")
        yield from ("![validation accuracy over processor time](images/speedrun.png)", "")
    if kind != "peers":
        yield table(kind, stored["found"])


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


def _images(stored: dict[str, Any]) -> Iterator[str]:
    """What scripts/bench/images.py measured."""
    where = stored["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    where = f"{where['cores']} cores, {where['threads']} threads, load {where['load'][0]:.1f}, {versions}"
    yield f"`python -m scripts.bench.images`: {where}."
    yield ""
    yield "| loader | images/s | over timm's | bar | |"
    yield "|---|---|---|---|---|"
    for who, row in stored["summary"].items():
        ratio = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        bar = IMAGES.get(who)
        verdict = _verdict(row["ratio"] >= bar) if bar else ""
        yield f"| {who} | {row['images_per_second']:,.0f} | {ratio} | {f'>= {bar}' if bar else ''} | {verdict} |"

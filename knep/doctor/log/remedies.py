"""The line at the end of a finding from curves: one that can be typed."""

from __future__ import annotations

import shlex
from dataclasses import replace

from knep.doctor.findings import Finding
from knep.doctor.log.curves import Curves


def with_commands(finding: Finding, curves: Curves) -> Finding:
    """With the command of each prescription for a run of knep; for others its words, as no line of theirs is known."""
    if finding.disease == "stopping_too_early" and curves.lines is not None:
        finding = replace(finding, overrides=_longer(curves.lines))
    if not finding.overrides:
        return finding
    if curves.lines is None:
        ways = " or ".join(" ".join(way) for way in finding.overrides[:2])
        own = f"{_in_words(finding)}, what knep calls {ways}"
        return replace(finding, overrides=(), mend=own if not finding.mend else f"{finding.mend}; or {own}")
    lines = [*curves.lines]
    commands = [command([*_without(lines, way), *way]) for way in finding.overrides[:2]]
    return replace(finding, mend="; or: ".join([*([finding.mend] if finding.mend else []), *commands]))


def command(lines: list[str]) -> str:
    return f"python train.py {shlex.join(lines)}"


def _without(lines: list[str], way: tuple[str, ...]) -> list[str]:
    """The run's lines but those that a prescription sets anew."""
    anew = {_key(line) for line in way}
    return [line for line in lines if _key(line) not in anew]


def _longer(lines: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Twice as many epochs as the run's own line asks for; nothing where it has none."""
    asked = [value for line in lines for key, _, value in [line.partition("=")] if key == "trainer.max_epochs"]
    return ((f"trainer.max_epochs={2 * int(asked[-1])}",),) if asked and asked[-1].isdecimal() else ()


def _key(line: str) -> str:
    return line.partition("=")[0].lstrip("+~")


def _in_words(finding: Finding) -> str:
    line = finding.overrides[0][0]
    key, _, value = line.partition("=")
    words = {
        "optimizer.lr": f"try a learning rate of {value}",
        "augment": "try augmentation",
        "clip": "try clipping the gradient's norm to 1",
        "scheduler": "try a schedule that falls to 0",
        "trainer.max_epochs": f"try {value} epochs",
    }
    return words.get(key, "try it")

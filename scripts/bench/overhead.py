"""What an option costs: the same run with it and without, in turn, as a share of the step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scripts.bench.bars import EVERY
from scripts.bench.cases import CASES, Case
from scripts.bench.contenders import knep, prepared
from scripts.bench.watch import Timing

OPTIONS = {
    "guard": ("guard=stop", "guard=none"),
    "doctor": ("callbacks=doctor", "callbacks=none"),
    "saving": ("checkpoint.every={every}", "checkpoint.every=null"),
}
# The doctor's looks are close together at the start of a run and 200 steps apart behind it: its cost is that of a run
# as long as people's, not of a dozen steps. Minutes each for the largest network.
_DOCTORED = {
    "mlp_64": 4000,
    "cnn_64": 400,
    "cnn_512": 100,
    "resnet20_128": 400,
    "resnet18_128": 200,
    "inception_128": 200,
}


def overhead(kind: str, names: Sequence[str], repeats: int, count: int | None) -> dict[str, Any]:
    """What the first of an option's two lines adds over the second, per case: see `_shares`, and the steps.

    Runs that are shorter than two intervals between checkpoints save twice all the same, and what that adds is
    scaled to the interval; every: the steps between the checkpoints of the run.
    """
    found: dict[str, Any] = {}
    more, less = OPTIONS[kind]
    for name in names:
        steps = count or (_DOCTORED[name] if kind == "doctor" else CASES[name].steps)
        case = replace(CASES[name], steps=steps)
        data = prepared(case)
        every = min(EVERY, max(1, steps // 2))
        pairs = [_pair(case, data, turn, [more.format(every=every)], [less]) for turn in range(repeats)]
        saves = kind == "saving"
        found[name] = _shares(pairs, every / EVERY if saves else 1) | {"steps": steps}
        if saves:
            found[name]["every"] = every
        print(name, found[name], flush=True)
    return found


def _pair(case: Case, data: Any, turn: int, more: list[str], less: list[str]) -> tuple[Timing, Timing]:
    """Two neighbouring runs, with the option and without; every other turn the other way round."""
    order = [more, less] if turn % 2 else [less, more]
    taken = {tuple(lines): knep(case, data, lines) for lines in order}
    return taken[tuple(more)], taken[tuple(less)]


def _shares(pairs: Sequence[tuple[Timing, Timing]], factor: float) -> dict[str, float]:
    """Added share of wall and of processor time, times factor: of the medians, and of the fastest runs, the least
    disturbed.
    """
    found: dict[str, float] = {}
    for clock in ("wall", "cpu"):
        more, less = ([getattr(t, clock) for t in side] for side in zip(*pairs, strict=True))
        found[clock] = round(factor * (statistics.median(more) / statistics.median(less) - 1), 4)
        found[f"{clock}_fastest"] = round(factor * (min(more) / min(less) - 1), 4)
    return found

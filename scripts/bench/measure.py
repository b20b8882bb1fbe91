"""Taking turns, and what is said of the numbers: medians, ratios of neighbours, their spread.

Each turn is a process of its own, a child of one that has imported all: what a contender sets for its process, such as
how memory is kept, is no other's.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from knep.engine.build import threads
from scripts.bench.cases import CASES, Case
from scripts.bench.contenders import contenders, prepared
from scripts.bench.watch import Timing


def steps(names: Sequence[str], repeats: int, count: int | None, peers: bool = False) -> dict[str, Any]:
    """Samples/s of each contender on each case, in turn A B A B, and knep's ratio to each of the others."""
    found: dict[str, Any] = {}
    for name in names:
        case = CASES[name] if count is None else replace(CASES[name], steps=count)
        taken: dict[str, list[Timing]] = {who: [] for who in contenders(peers)}
        for turn in range(repeats):
            for who in taken:
                with _process() as one:
                    taken[who].append(one.submit(_turn, who, case, turn, peers, torch.get_num_threads()).result())
        found[name] = summary(taken, case.batch * case.steps)
        print(name, line(found[name]), flush=True)
    return found


def _process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.bench.contenders", "knep.cli.train", "knep.recipes.recipe"])
    return ProcessPoolExecutor(1, context)


def _turn(who: str, case: Case, turn: int, peers: bool, count: int) -> Timing:
    """One contender's run, in a process that does nothing else."""
    with threads(count):
        torch.manual_seed(turn)
        return contenders(peers)[who](case, prepared(case))


def summary(taken: Mapping[str, Sequence[Timing]], images: int) -> dict[str, Any]:
    """Medians, and ratios of runs that were neighbours in time, so that a busy moment weighs on both sides."""
    rates = {who: [images / t.wall for t in ts] for who, ts in taken.items()}
    out: dict[str, Any] = {
        "samples_per_second": {who: round(statistics.median(r), 1) for who, r in rates.items()},
        "runs": {who: [round(x, 1) for x in r] for who, r in rates.items()},
        "ratio": {},
    }
    for who in taken:
        if who != "knep":
            wall = [o.wall / k.wall for k, o in zip(taken["knep"], taken[who], strict=True)]
            cpu = [o.cpu / k.cpu for k, o in zip(taken["knep"], taken[who], strict=True)]
            out["ratio"][who] = {
                "median": round(statistics.median(wall), 3),
                "low": round(min(wall), 3),
                "high": round(max(wall), 3),
                "cpu": round(statistics.median(cpu), 3),
            }
    return out


def line(found: Mapping[str, Any]) -> str:
    """One case in one line."""
    rates = "  ".join(f"{who} {rate:,.0f}/s" for who, rate in found["samples_per_second"].items())
    ratios = "  ".join(
        f"knep/{who} {r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}] cpu {r['cpu']:.3f}"
        for who, r in found["ratio"].items()
    )
    return f"{rates}  {ratios}"

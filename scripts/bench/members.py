"""Members at once against runs one after another: the same seeds, the same epochs, on the same machine in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from knep.config.schema import RunConfig
from knep.engine.fit import fit_member
from knep.ensemble.loop import fit
from knep.ensemble.support import members_of
from knep.run.run import hush
from scripts.bench.cases import CASES, compose, read
from scripts.bench.watch import Timing, screen

COUNT = 8


def members(names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Members/s of fits at once and in single runs, in turn A B A B, with the ratio of neighbours by wall and CPU time.

    Both build, train and validate; a single run writes its logs and checkpoints besides, as train.py does.
    """
    hush()
    found = {}
    for name in names:
        case = CASES[name]
        config = compose(case, ["trainer.max_epochs=1", f"data.limit={case.batch * (case.warm + case.steps)}"])
        data, seeds = read(config), members_of(RunConfig.of(config), COUNT)
        ways: dict[str, Callable[[], Any]] = {
            "single": lambda seeds=seeds, data=data: _one_by_one(seeds, data),
            "in turn": lambda seeds=seeds, data=data: fit(seeds, data, together=False),
            "one pass": lambda seeds=seeds, data=data: fit(seeds, data, together=True),
        }
        taken = {way: [] for way in ways}
        for _ in range(repeats):
            for way, run in ways.items():
                taken[way].append(_timed(run))
        found[name] = _summary(taken)
        print(name, found[name], flush=True)
    return found


def _one_by_one(seeds: Sequence[RunConfig], data: Any) -> None:
    for run in seeds:
        with tempfile.TemporaryDirectory() as folder, screen():
            fit_member(run, data, Path(folder), run.seed)


def _timed(run: Callable[[], Any]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def _summary(taken: dict[str, list[Timing]]) -> dict[str, Any]:
    rates = {way: round(COUNT / statistics.median(t.wall for t in ts), 3) for way, ts in taken.items()}
    out: dict[str, Any] = {"members": COUNT, "members_per_second": rates, "ratio": {}}
    for way in ("in turn", "one pass"):
        pairs = list(zip(taken["single"], taken[way], strict=True))
        wall = [single.wall / ours.wall for single, ours in pairs]
        out["ratio"][way] = {
            "median": round(statistics.median(wall), 2),
            "low": round(min(wall), 2),
            "high": round(max(wall), 2),
            "cpu": round(statistics.median(single.cpu / ours.cpu for single, ours in pairs), 2),
        }
    return out

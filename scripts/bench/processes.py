"""What needs a fresh process: peak memory, and the time until a command answers."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_FIRST_STEP = "import sys; from scripts.bench.first import main; main(sys.argv[1:])"


def _python(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def startup(repeats: int, data: Sequence[str]) -> dict[str, Any]:
    """Median seconds of the commands, in turn; the first step against the imports and the data alone.

    data: the overrides that name the data set.
    """
    target = {"data=fashion_mnist": "mnist import FashionMnist as D"}.get(data[0], "synthetic import Synthetic as D")
    options = "" if "mnist" in target else "images=60000, image_size=28"
    # Both leave without taking the interpreter down, which costs a second once torch is in it.
    baseline = f"import os, torch, lightning; from knep.data.{target}; D({options}).prepare(); os._exit(0)"
    taken: dict[str, list[float]] = {"help": [], "cfg": [], "first_step": [], "imports_and_data": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            run = [*data, "recipe=none", "model=mlp", "trainer=cpu", "trainer.max_steps=1", f"hydra.run.dir={folder}/r"]
            taken["help"].append(_python("-m", "knep.cli", "--help"))
            taken["cfg"].append(_python("train.py", "--cfg", "job"))
            taken["first_step"].append(_python("-c", _FIRST_STEP, *run))
            taken["imports_and_data"].append(_python("-c", baseline))
    out: dict[str, Any] = {name: round(statistics.median(values), 3) for name, values in taken.items()}
    out["ratio"] = round(
        statistics.median(a / b for a, b in zip(taken["first_step"], taken["imports_and_data"], strict=True)), 3
    )
    return out


def memory(names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Peak resident memory (MiB) of each contender in fresh processes, and knep's over the hand-written loop's.

    added: how far training rose above the peak of the imports and of reading the data; 0 where it stayed below.
    """
    found: dict[str, Any] = {}
    for name in names:
        peaks = {who: [_peak(name, who) for _ in range(repeats)] for who in ("knep", "hand", "usual")}
        medians = {who: round(statistics.median(p for p, _ in pairs), 1) for who, pairs in peaks.items()}
        added = {who: round(statistics.median(p - start for p, start in pairs), 1) for who, pairs in peaks.items()}
        found[name] = {"mib": medians, "added": added, "ratio": round(medians["knep"] / medians["hand"], 3)}
        print(name, found[name], flush=True)
    return found


def _peak(case: str, who: str) -> tuple[float, float]:
    """The peak of the whole process, and the one before training."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench", "peak", "--models", case, "--contender", who],
        cwd=_ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    start, peak = map(float, done.stdout.split()[-2:])
    return peak, start


def own_peak() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

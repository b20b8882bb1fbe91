"""Accuracy, or what else its task measures, of a command over several seeds: `knep seeds --seeds 5 recipe=digits_best`.

Prints mean and deviation of the test metric, the validation metric that chose, and the seconds; `--out` keeps them,
and goes on where an earlier call of the same config was stopped. With `--processes 2 threads=1` seeds run side by
side; the seconds are then those of a run that shares the machine; its processor time hardly changes.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from knep.config.compose import compose_config
from knep.config.schema import config_hash
from knep.errors import InputError, RunFailed
from knep.evidence.effects import Metric, metric_of
from knep.io.atomic import write_atomic
from knep.io.provenance import commit, processor
from knep.utils.text import shown


def seeds(overrides: Sequence[str], count: int = 5, processes: int = 1, out: Path | None = None) -> None:
    """Runs the seeds 0 ... count - 1 that `out` does not hold yet, and prints what came of all of them."""
    for option, value in (("seeds", count), ("processes", processes)):
        if value < 1:
            raise InputError(f"--{option}={value} must be at least 1")
    # Refuses a line that is wrong here, not once in each run.
    metric = metric_of(compose_config(list(overrides)).config)
    runs = earlier(out, overrides)
    _check(out)
    with ThreadPoolExecutor(processes) as pool:
        waiting = {pool.submit(one, overrides, seed, metric.name): seed for seed in range(count) if seed not in runs}
        try:
            for done in as_completed(waiting):
                runs[waiting[done]] = run = done.result()
                print(f"seed {waiting[done]}: test {_said(run, metric)}, {run['seconds']:.0f} s", flush=True)
                if out:  # after each seed, so that an interruption leaves what was measured, with its n
                    write_atomic(out, json.dumps(result(overrides, runs, metric.name), indent=2) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C or a failure no other seed begins
            raise
    measured = result(overrides, runs, metric.name)
    print(json.dumps({k: v for k, v in measured.items() if k != "runs"}, indent=2))


def _said(run: dict[str, Any], metric: Metric) -> str:
    value = run[f"test/{metric.name}"]
    return f"{value:.2%}" if metric.name == "acc" else f"{metric.name} {value:.4g}"


def _check(out: Path | None) -> None:
    """Refuses before hours of training what could not be written after them."""
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={shown(out)} cannot be written ({error.strerror}): choose another folder") from error
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"--out={shown(out)} cannot be written: choose another folder")


def one(overrides: Sequence[str], seed: int, metric: str = "acc") -> dict[str, Any]:
    """The summary of one run in a process of its own, with its processor time and validation metric by epoch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "knep.cli.train", *overrides, f"seed={seed}", "progress=false"]
        with subprocess.Popen([*command, f"hydra.run.dir={folder}/run"], stdout=subprocess.DEVNULL) as child:
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RunFailed(f"seed {seed} ended with exit code {child.returncode}: {' '.join(command)}")
        with Path(folder, "run", "metrics.csv").open(newline="") as f:
            curve = [float(row[f"val/{metric}"]) for row in csv.DictReader(f) if row.get(f"val/{metric}")]
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        said = re.search(r"\bprecision (\w[\w-]*)", Path(folder, "run", "train.log").read_text(encoding="utf-8"))
        where = {"commit": commit() or None, "torch": version("torch"), "precision": said[1] if said else None}
        cost = {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
        return summary | cost | where | {"val_curve": curve}


def result(overrides: Sequence[str], runs: dict[int, dict[str, Any]], metric: str = "acc") -> dict[str, Any]:
    """Mean and deviation over the runs so far, with the command, how many they are, and where they ran."""
    ordered = [runs[seed] for seed in sorted(runs)]
    tests = [run[f"test/{metric}"] for run in ordered]
    return {
        "command": " ".join(["python train.py", *overrides]),
        "n": len(runs),
        f"test_{metric}_mean": statistics.fmean(tests),
        f"test_{metric}_std": statistics.stdev(tests) if len(tests) > 1 else None,
        f"val_{metric}_mean": statistics.fmean(run[f"val/{metric}"] for run in ordered),
        "cpu_seconds_mean": statistics.fmean(run["cpu_seconds"] for run in ordered),
        "seconds_mean": statistics.fmean(run["seconds"] for run in ordered),
        "parameters": ordered[0]["parameters"],
        "tested": weights(compose_config(list(overrides)).choices),
        **{key: _all(ordered, key) for key in ("commit", "torch", "precision")},
        "hardware": f"{platform.machine()}, {processor()}",
        "runs": {str(seed): runs[seed] for seed in sorted(runs)},
    }


def _all(runs: Sequence[Mapping[str, Any]], key: str) -> str | None:
    """What the runs say of a fact, each value once; None where one of them does not know it."""
    values = [run.get(key) for run in runs]
    return ", ".join(sorted({str(v) for v in values})) if all(values) else None


def weights(choices: Mapping[str, str]) -> str:
    """Which weights a run tests: by `stopping` those of the best epoch, or of the last; by `averaging` an average."""
    epoch = "best epoch by validation" if choices["stopping"] == "early" else "last epoch"
    return epoch if choices["averaging"] == "none" else f"{epoch}, {choices['averaging']}"


def earlier(path: Path | None, overrides: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The runs that `path` already holds of what these overrides mean today: a recipe may have changed since."""
    if path is None or not (path.exists() or path.is_symlink()):
        return {}
    try:
        kept = {int(seed): run for seed, run in json.loads(path.read_text(encoding="utf-8"))["runs"].items()}
        return {seed: run for seed, run in kept.items() if run["config_hash"] == hashed(overrides, seed)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"--out={shown(path)} holds no runs of earlier seeds: choose another file") from error


def hashed(overrides: Sequence[str], seed: int) -> str:
    """The hash of the config that a run with this seed has."""
    return config_hash(compose_config([*overrides, f"seed={seed}", "progress=false"]).config)

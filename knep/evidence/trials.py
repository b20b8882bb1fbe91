"""Trials: one arm with one seed each, in a process of its own, kept as soon as it has ended.

A trial's name is the hash of its resolved config, so that a study that was stopped goes on with what is missing, and
two arms that mean the same run share it. What failed is kept as failed, with its reason; nothing is dropped.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from knep.config.budget import lift
from knep.config.compose import Composed, compose_config
from knep.config.instantiate import allow, allowed, take_allowed
from knep.config.schema import config_hash
from knep.errors import InputError
from knep.evidence.arms import Arm
from knep.evidence.effects import metric_of
from knep.io.atomic import write_atomic
from knep.io.provenance import commit
from knep.utils.orphans import ends_with

# Stands for the seed while an arm is composed: the largest that a run takes, so that no other value is equal to it.
_SEED = 2**32 - 1
_ASKED = (0, -2, -15)  # exit codes of a process that Ctrl-C or SIGTERM stopped, by itself or by the signal
# What a run imports when it gets there: half a second in each trial, or once.
_PRELOAD = [
    "knep.cli.train",
    "knep.engine.build",
    "knep.engine.fit",
    "knep.run.report",
    "knep.recipes.recipe",
    "knep.io.events",
    "sklearn.datasets",
]
_PRELOAD += ["torch.utils.tensorboard", "knep.recipes.norm", "knep.recipes.dropout", "knep.recipes.init"]


@dataclass(frozen=True)
class Trial:
    """One arm with one seed, composed. key: its config's hash.

    tested: False for a trial of a search, which looks at the validation split alone.
    """

    arm: str
    seed: int
    made: Composed
    tested: bool = True

    @property
    def key(self) -> str:
        return config_hash(self.made.config) + ("" if self.tested else "v")


def plan(arms: Iterable[Arm], seeds: Sequence[int], common: Sequence[str] = ()) -> list[Trial]:
    """Every arm with every seed, seeds outermost so that pairs are complete early. Raises InputError before any runs.

    common: lines that watch a run and do not change it, added to each.
    """
    made = [(arm.name, composed(arm, common)) for arm in arms]
    return [Trial(name, seed, _seeded(one, seed)) for seed in seeds for name, one in made]


def composed(arm: Arm, common: Sequence[str] = ()) -> Composed:
    """An arm with a stand-in for its seed, composed once however often it is asked for. Raises InputError."""
    return _composed((*arm.overrides, *common, f"seed={_SEED}"))


@lru_cache(maxsize=1024)
def _composed(lines: tuple[str, ...]) -> Composed:
    return compose_config(lines)


def _seeded(made: Composed, seed: int) -> Composed:
    """A composed arm with a seed of its own: composing takes a third of a second, a digits run hardly longer."""
    config = _replaced(made.config, seed)
    return Composed(config, made.choices, [*made.overrides[:-1], f"seed={seed}"])


def _replaced(node: Any, seed: int) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, seed) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, seed) for value in node]
    return seed if node == _SEED and isinstance(node, int) else node


class Store:
    """The records of a study: `trials/<key>.json` in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trials = folder / "trials"

    def record(self, key: str) -> dict[str, Any] | None:
        """What is known of a trial that has ended, or None."""
        path = self._trials / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep(self, key: str, record: dict[str, Any]) -> None:
        self._trials.mkdir(parents=True, exist_ok=True)
        write_atomic(self._trials / f"{key}.json", json.dumps(record, indent=1) + "\n")


def run_trials(
    trials: Sequence[Trial],
    store: Store,
    processes: int = 1,
    told: Callable[[int, int, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs what the store has not, and returns the record of each key.

    processes: trials side by side; told: called with (done, of how many, record) after each.
    """
    waiting = {t.key: t for t in trials if store.record(t.key) is None}
    context = _context()
    with ThreadPoolExecutor(max(1, processes)) as pool:
        jobs = {pool.submit(_in_process, context, t, store): t for t in waiting.values()}
        ended: dict[str, dict[str, Any]] = {}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                record = ended[jobs[job].key] = job.result()
                if told:
                    told(done, len(jobs), record)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {t.key: store.record(t.key) or ended[t.key] for t in trials}


def warmed() -> None:
    """Waits until trials can be forked: what each of them needs is imported then, and the first takes no longer."""
    child = _context().Process(target=os.getpid)
    child.start()
    child.join()


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)  # torch is imported once, not in each trial
    _start_server()
    return context


def _start_server() -> None:
    """Starts what trials are forked from: by `-c`, which would look in the current folder first."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _in_process(context: ForkServerContext, trial: Trial, store: Store) -> dict[str, Any]:
    take_allowed(dict(trial.made.config))  # refuses here what nobody typed; the child is told what was
    child = context.Process(target=_trial, args=(trial, store.folder, allowed()))
    child.start()
    child.join()
    record = store.record(trial.key)
    if record is None:  # stopped, killed, or out of memory: it could not write its own end
        asked = child.exitcode in _ASKED
        why = {"status": "interrupted" if asked else "failed", "reason": f"its process ended with {child.exitcode}"}
        record = _about(trial) | why
        if not asked:  # a trial that was asked to stop has shown nothing, and is run again
            store.keep(trial.key, record)
    return record


def _about(trial: Trial) -> dict[str, Any]:
    made = trial.made
    words = [line for line in made.overrides if not line.startswith("progress=")]
    return {"key": trial.key, "arm": trial.arm, "seed": trial.seed, "overrides": words, "commit": commit()}


def _trial(trial: Trial, folder: Path, names: Sequence[str] = ()) -> None:
    """The body of a trial's process: trains, tests, keeps the record, throws the run folder away.

    names: what the user allowed configs to build, in the process that the command runs in.
    """
    for name in names:
        allow(name)
    config = dict(trial.made.config)
    for limit, value in (config.pop("budget", None) or {}).items():
        lift(limit, value)
    config.pop("allow_targets", None)
    server = multiprocessing.parent_process()
    if server is not None:
        ends_with(server.is_alive)
    place = Path(tempfile.mkdtemp(prefix="knep-trial-"))
    began, record = time.perf_counter(), _about(trial)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            summary = _runner(trial)(config, place / "run", trial.made.choices, trial.made.overrides)
        record |= _finite(summary | {"curve": _curve(place / "run", metric_of(trial.made.config).name)})
    except InputError as error:  # this trick cannot be done to this model
        record |= {"status": "refused", "reason": " ".join(str(error).split())[:400]}
    except Exception as error:  # a trial that fails is a result: it is kept with what it said
        text = without_folder(str(error).split("\n")[0], place)
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {text}"[:400]}
    used = resource.getrusage(resource.RUSAGE_SELF)
    record |= {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "wall_seconds": round(time.perf_counter() - began, 2),
        "peak_mib": round(used.ru_maxrss / 1024, 1),
    }
    shutil.rmtree(place, ignore_errors=True)
    if record["status"] != "interrupted":
        Store(folder).keep(trial.key, record)


def without_folder(text: str, place: Path) -> str:
    """A message without the clauses that point into the run folder, which is thrown away."""
    return "; ".join(part for part in text.split("; ") if str(place) not in part)


def _runner(trial: Trial) -> Callable[..., dict[str, Any]]:
    from knep.run.run import run
    from knep.run.unread import validated

    return partial(run, figures=False) if trial.tested else validated  # the run folder is thrown away


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record, as a failed one where its loss is no number; JSON has no words for those, so they become null."""
    losses = [record[key] for key in ("val/loss", "test/loss") if key in record]
    if not all(map(math.isfinite, losses)):
        record |= {"status": "failed", "reason": "the loss is not finite"}
    return json.loads(json.dumps(record), parse_constant=lambda word: None)


def _curve(folder: Path, metric: str) -> list[dict[str, float]]:
    """The validation metric and loss of each epoch, with the optimizer steps done by then."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        rows = [r for r in csv.DictReader(f) if r.get(f"val/{metric}")]
    keys = (f"val/{metric}", "val/loss", f"train/{metric}", "train/loss")
    return [{"step": int(r["step"]) + 1} | {k: float(r[k]) for k in keys if r.get(k)} for r in rows]

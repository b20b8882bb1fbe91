"""Short runs of a config on data that are prepared once: what the range test and the trials are made of."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from knep.config.instantiate import instantiate
from knep.config.schema import RunConfig
from knep.data.base import ImageData
from knep.engine.build import threads
from knep.engine.fit import fit_member
from knep.errors import InputError, OutOfMemory, RunFailed, named
from knep.run.run import hush

_NO_STOPPING = {"_target_": "knep.recipes.stopping.none"}
MOST_STEPS = 10**6


@dataclass
class Problem:
    """A composed run and its prepared data. total: optimizer steps of the whole run; per_epoch: of an epoch."""

    config: Mapping[str, Any]
    data: ImageData
    total: int
    per_epoch: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Problem:
        """Prepares the data. Raises InputError for runs that no single rate describes."""
        run = RunConfig.of(config)
        if run.members > 1:
            raise InputError("a rate is looked for with one model: leave out averaging=ensemble and trainer.members")
        if run.trainer.devices not in (1, "auto") or run.trainer.num_nodes > 1:
            raise InputError("a rate is looked for in one process: write trainer.devices=1, then use what is found")
        accumulate = config["optimizer"].get("accumulate", config["accumulate"])
        if isinstance(accumulate, Mapping):
            raise InputError("a rate is looked for with batches of one size: write accumulate=1, then optimizer.lr_per")
        with named("data"):
            data = instantiate(run.data)
            data.prepare()
        if getattr(data, "micro", None) == "auto":
            raise InputError("a rate is looked for with parts of one size: write a number instead of data.micro=auto")
        batches = data.train_batches
        if not math.isfinite(batches):
            batches = max(run.trainer.max_steps, 1)
        each = 1 if accumulate == "epoch" else max(1, -(-int(batches) // int(accumulate)))
        epochs = run.trainer.max_epochs or -1
        limits = [n for n in (epochs * each, run.trainer.max_steps) if n > 0]
        return cls(config, data, min(limits, default=MOST_STEPS), each)

    def fit(self, changes: Mapping[str, Any], steps: int, seed: int, watcher: Callback) -> None:
        """Trains about `steps` optimizer steps, whole epochs where these are shorter, of the config with `changes`.

        changes: key path -> value; watcher: sees the run, of which nothing is kept. A run that its guard stops ends
        like any other.
        """
        fixed = {
            "stopping": _NO_STOPPING,
            "seed": seed,
            "progress": False,
            "compile": False,
            "ckpt": None,
            "calibrate": False,
        }
        config = _changed(self.config, {**fixed, "profile": False, "callbacks": None, "doctor": None, **changes})
        epochs = max(1, round(steps / self.per_epoch))
        length: dict[str, Any] = {"max_steps": -1, "max_epochs": epochs, "max_time": None}
        if steps < self.per_epoch:
            micro = getattr(self.data, "micro", None)
            parts = self.data.whole_batch // micro if isinstance(micro, int) else 1
            accumulate = int(config["optimizer"].get("accumulate", config["accumulate"]))
            length["limit_train_batches"] = steps * accumulate * parts
        run = RunConfig.of({**config, "trainer": {**config["trainer"], **length}})
        with tempfile.TemporaryDirectory(prefix="knep-rate-") as folder, threads(run.runtime.threads), quiet():
            try:
                fit_member(run, self.data, Path(folder), seed, callbacks=[watcher])
            except OutOfMemory:
                raise
            except RunFailed:
                return


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that a run prints."""
    hush()
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(config)
    for key, value in changes.items():
        group, _, name = key.partition(".")
        made[group] = {**made[group], name: value} if name else value
    return made

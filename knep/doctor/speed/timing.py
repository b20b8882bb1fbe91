"""Blocks of a run's own steps, timed: each block is the run's fit, cut after some steps."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from knep.config.compose import compose_config
from knep.config.instantiate import instantiate, take_allowed
from knep.config.schema import RunConfig
from knep.engine.build import threads
from knep.engine.fit import fit_member
from knep.errors import InputError, RunFailed

WARM = 4  # steps before a block is timed


@dataclass(frozen=True)
class Block:
    """Seconds of a block's steps, by the clock and of the process on all threads; between: by the clock, from the end
    of a step to the start of the next, where data is fetched and Python runs; rows: of data that the steps took.
    """

    wall: float
    cpu: float
    between: float
    steps: int
    rows: int
    device: str

    @property
    def per_row(self) -> float:
        """Seconds for a row: of the process on CPUs, which other programs disturb least, else by the clock."""
        return (self.cpu if self.device == "cpu" else self.wall) / self.rows


class _Watch(Callback):
    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._ended = steps, 0, 0.0
        self._began = (0.0, 0.0)
        self.between = 0.0
        self.block: Block | None = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self._done >= WARM and self._ended:
            self.between += time.perf_counter() - self._ended

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._done += 1
        device = trainer.strategy.root_device.type
        if self._done in (WARM, WARM + self._steps) and device == "cuda":
            torch.cuda.synchronize()
        if self._done == WARM:
            self._began, self.between = (time.perf_counter(), time.process_time()), 0.0
        if self._done == WARM + self._steps:
            wall, cpu = self._began
            taken = time.perf_counter() - wall, time.process_time() - cpu
            self.block = Block(*taken, self.between, self._steps, 0, device)
        self._ended = time.perf_counter()


def block(lines: Sequence[str], steps: int, data: dict[str, Any]) -> Block:
    """Times so many steps of the run of these lines. data: prepared data by its config, kept from block to block.

    Raises InputError for lines that no run can be made of, and for a run that fails.
    """
    made = compose_config([*lines, *_short(steps)])
    take_allowed(made.config)
    run = RunConfig.of(made.config)
    key = repr(made.config["data"])
    if key not in data:
        data[key] = instantiate(run.data)
        data[key].prepare()
    watch = _Watch(steps)
    with tempfile.TemporaryDirectory() as folder, _quiet(), threads(run.runtime.threads):
        try:
            fit_member(run, data[key], Path(folder), seed=run.seed, callbacks=[watch])
        except RunFailed as error:
            raise InputError(f"the run fails before it can be timed: {error}") from error
    if watch.block is None:
        raise InputError(f"the run ends before step {WARM + steps}, too few to be timed: give more data or epochs")
    size = int(made.config["data"]["batch_size"]) * int(made.config["accumulate"])
    return Block(**{**vars(watch.block), "rows": steps * size})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a run prints is not the report's."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _short(steps: int) -> list[str]:
    return [
        *(f"trainer.max_steps={WARM + steps}", "trainer.max_epochs=100000", "trainer.limit_val_batches=1"),
        *("progress=false", "resume=false", "ckpt=null"),
    ]

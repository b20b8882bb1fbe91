"""A stopwatch over the steps of a training run, and the screen on which progress bars draw."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


@dataclass
class Timing:
    """Seconds of the measured steps: by the clock, and of the process on all its threads."""

    wall: float
    cpu: float


class StopWatch(Callback):
    """Measures from the end of step `warm` to the end of step `warm + steps`."""

    def __init__(self, warm: int, steps: int) -> None:
        self._first, self._last = warm, warm + steps
        self._began = (0.0, 0.0)
        self._done = 0
        self.timing: Timing | None = None

    def tick(self) -> None:
        """Called when a step has ended."""
        self._done += 1
        if self._done == self._first:
            self._began = (time.perf_counter(), time.process_time())
        if self._done == self._last:
            wall, cpu = self._began
            self.timing = Timing(time.perf_counter() - wall, time.process_time() - cpu)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tick()


class _Screen(io.TextIOBase):
    """A terminal that nobody looks at."""

    encoding = "utf-8"  # type: ignore[assignment]

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def screen() -> Iterator[None]:
    """Progress bars draw as in a terminal, and nothing is seen of it."""
    with contextlib.redirect_stdout(_Screen()), contextlib.redirect_stderr(io.StringIO()):
        yield

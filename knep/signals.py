"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop; a second one stops at once."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

_HEARD = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run was asked to stop; a checkpoint to go on from was written first. number: of the signal, 2 or 15."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"signal {int(number)}")
        self.number = int(number)


class StopOnSignal(Callback):
    """Notes the first signal for whoever saves checkpoints; raises Interrupted at the second.

    asked: the signal's number, 0 while there was none.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # Lightning has put its own handler for SIGTERM in between

    def _listen(self) -> None:
        for number in _HEARD:
            with contextlib.suppress(ValueError):  # signals can be handled in the main thread only
                earlier = signal.signal(number, self._ask)
                self._before.setdefault(number, earlier)

    def _ask(self, number: int, *_: Any) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            raise Interrupted(number)
        self.asked = number

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.dynamics.write(trainer.loggers)  # the last steps before a failure tell most about it

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

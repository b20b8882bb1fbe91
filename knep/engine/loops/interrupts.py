"""Ctrl-C, SIGTERM, SLURM's SIGUSR1 and the SIGHUP of a closed terminal: finish the step, save a checkpoint, stop.

A second one stops at once. One that was ignored when the run began stays ignored: so nohup and `&` in a script mean it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from knep.errors import Interrupted

if TYPE_CHECKING:
    from knep.engine.module import Classifier

_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Launchers forward what their whole process group was sent already: seconds in which a signal is the same request.
_SAME = 0.5


def exit_code(number: int) -> int:
    """129 after SIGHUP, 130 after Ctrl-C; 143 after SIGTERM, and after SIGUSR1, by which SLURM means the same."""
    return 128 + (number if number in (signal.SIGHUP, signal.SIGINT) else signal.SIGTERM)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Raises Interrupted at a signal within; while a model is fitted, StopOnSignal listens instead."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can be handled in the main thread only
        return
    ours = os.getpid()

    def stop(number: int, *_: object) -> None:
        if os.getpid() == ours:  # and not a worker that was forked here, which ends with its loader
            raise Interrupted(number)

    heeded = [number for number in _HEARD if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnSignal(Callback):
    """Notes the first signal for whoever saves checkpoints; raises Interrupted at the second.

    asked: the signal's number, 0 while there was none.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # Lightning has put its own handler for SIGTERM in between

    def _listen(self) -> None:
        for number in _HEARD:
            earlier = self._before.get(number, signal.getsignal(number))
            with contextlib.suppress(ValueError):  # signals can be handled in the main thread only
                signal.signal(number, signal.SIG_IGN if earlier == signal.SIG_IGN else self._ask)
                self._before[number] = earlier

    def _ask(self, number: int, *_: object) -> None:
        if not self.asked:
            self.asked, self._when = number, time.monotonic()
        elif number != signal.SIGHUP and time.monotonic() - self._when > _SAME:  # nobody is impatient at no terminal
            signal.signal(number, signal.SIG_DFL)
            raise Interrupted(number)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, OSError):  # which the logs may have raised, and would again
            # The last steps before a failure tell most about it.
            cast("Classifier", pl_module).dynamics.write(trainer.loggers)
        self._forget()  # Lightning tears no callback down after an exception

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    def _forget(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

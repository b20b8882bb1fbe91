"""Processes that end with the one that started them: by the kernel where it can, else by looking each second."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

LAUNCHER = "KNEP_LAUNCHER"  # tells a process that this package started the id of the one that did
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_PERIOD = 0.5  # seconds


def killed_with(parent: int) -> None:
    """The kernel kills this process when the thread that started it ends, however starved the machine is (Linux).

    parent: the id of its process, for the case that it ended before this was said.
    """
    _signal_of_death(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def ends_with_launcher() -> None:
    """One of several processes of a training ends with the one that started it: another of them, or torchrun."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and LAUNCHER in os.environ:
        killed_with(int(os.environ[LAUNCHER]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        killed_with(os.getppid())


def spared() -> None:
    """Takes `killed_with` back, for a process that has something to say first."""
    _signal_of_death(0)


def _signal_of_death(number: int) -> None:
    if sys.platform == "linux":
        import ctypes  # which commands that start no process do without

        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, number, 0, 0, 0)


def ends_with(lives: Callable[[], bool], grace: float = 0.0) -> None:
    """Ends this process, by a thread of its own, `grace` seconds after the one that it works for has ceased to live."""

    def look() -> None:
        while lives():
            time.sleep(_PERIOD)
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=look, name="knep-parent", daemon=True).start()


def ends_with_parent(parent: int, grace: float = 0.0) -> None:
    """`ends_with` the process that started this one, of that id."""
    ends_with(lambda: os.getppid() == parent, grace)

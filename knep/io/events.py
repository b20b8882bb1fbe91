"""TensorBoard's event files when the disk is full.

They are written by a thread, which dies of the error, prints a traceback, and keeps the error for whoever writes next.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def writers_quiet() -> Iterator[None]:
    """Within, a writer's thread that dies of a full disk prints nothing: the run is told at its next point or save."""
    earlier = threading.excepthook

    def quiet(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            earlier(args)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = earlier

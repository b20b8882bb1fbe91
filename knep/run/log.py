"""train.log: what a run prints, for whoever comes when the terminal is gone."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from knep.errors import InputError, RunFailed
from knep.utils.text import shown

NAME = "train.log"
_ERASED = re.compile(r".*(?:\x1b\[2K|\r)(?=.)", re.DOTALL)  # a progress bar's earlier states
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\a\b]")


class _Log:
    """Lines in a file, which is made when there is one. A disk that is full ends the log, not the run."""

    def __init__(self, path: Path, first: str) -> None:
        self._path, self._first = path, first
        self.began = path.exists()
        self.writes = True

    def line(self, text: str) -> None:
        with contextlib.suppress(OSError):
            if self.writes:
                self.writes = False
                with self._path.open("a", encoding="utf-8", errors="backslashreplace") as f:
                    f.write(f"{self._first}{text}\n")
                self._first, self.writes = "", True


class _Copied:
    """A text stream that is what it was, whose lines a log takes too, without what a terminal obeys."""

    def __init__(self, stream: TextIO, log: _Log) -> None:
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        *whole, rest = (self._line + text).split("\n")
        for line in whole:
            self._log.line(_CODES.sub("", _ERASED.sub("", line)).rstrip())
        self._line = _ERASED.sub("", rest)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def logged(folder: Path, lines: Sequence[str]) -> Iterator[None]:
    """Copies what is printed within to train.log of a run's folder, behind the time and the run's override lines.

    An error that ends the run comes last. Input that is refused leaves no log where none was.
    """
    log = _Log(folder / NAME, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shown(' '.join(lines))}\n")
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    ours = {name: _Copied(stream, log) for name, stream in before.items() if stream is not None}
    for name, stream in ours.items():
        setattr(sys, name, stream)
    try:
        yield
    except InputError:
        if not log.began:
            log.writes = False
            (folder / NAME).unlink(missing_ok=True)
        raise
    except Exception as error:
        log.line(f"knep: {error}" if isinstance(error, RunFailed) else traceback.format_exc().rstrip())
        raise
    finally:
        for name, stream in ours.items():
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])


@contextlib.contextmanager
def logging_restored() -> Iterator[None]:
    """Python's logging as it was, when Hydra has ended: its handlers write into a run's folder, which may be gone."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)

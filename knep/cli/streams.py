"""stdout and stderr whose reader may leave (`| head`, a closed terminal, a full disk): nothing else ends with it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_NAMES = ("stdout", "stderr")
# What a reader that has left comes to: nobody is there to be told. Anything else is told on stderr, once.
_LEFT = (errno.EPIPE, errno.EIO, errno.EBADF)


class _Lasting:
    """A text stream that goes silent, where it would raise OSError, from its first failure on."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except BlockingIOError:
            pass  # its reader is behind: this text is lost, the next one may not be
        except OSError as error:
            self._silence()
            if error.errno not in _LEFT and self._name != "stderr":
                said = f"knep: {self._name} cannot be written ({error.strerror}): going on without it"
                print(said, file=sys.stderr, flush=True)
        except ValueError:
            if not self._stream.closed:
                raise

    def _silence(self) -> None:
        """Points the file below at nothing, for what its buffer still holds and for other writers, such as workers."""
        with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream.flush()


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Within, printing never fails; a stream that was closed from the start is one that nobody reads."""
    _occupy()
    before = {name: getattr(sys, name) for name in _NAMES}
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        ours = {name: _wrapped(before[name] or nowhere, name) for name in _NAMES}
        for name in _NAMES:
            setattr(sys, name, ours[name])
        try:
            yield
        finally:
            for name in reversed(_NAMES):
                ours[name].flush()
                if getattr(sys, name) is ours[name]:
                    setattr(sys, name, before[name])


def _wrapped(stream: TextIO | _Lasting, name: str) -> _Lasting:
    return stream if isinstance(stream, _Lasting) else _Lasting(stream, name)


def _occupy() -> None:
    """Opens what of descriptors 0 to 2 is closed, or the next file would get its number, and what C code prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one

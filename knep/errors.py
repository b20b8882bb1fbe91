"""The errors that knep raises for its users: one line each, naming what is wrong, where, and what to write instead."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """What the user wrote cannot work; the commands print it as one line and exit with code 2."""


class NoEffectError(InputError):
    """A trick was asked for and changed nothing, with the reason why."""


class RunFailed(Exception):
    """A run that began could not go on: a full disk, a guard's stop, a process that died.

    The commands print it as one line and exit with code 1; summary.json says `failed` and gives the line as reason.
    findings: what the doctor had found by then, where it watched, as plain data.
    """

    findings: Sequence[Mapping[str, Any]] = ()


class OutOfMemory(RunFailed):
    """A step that there was no memory for: another learning rate would not have helped."""


def is_full(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether there was no room for what should be written: on the disk, in a quota, or within a limit on files."""
    return isinstance(error, OSError) and error.errno in _FULL


class Interrupted(BaseException):
    """A run was asked to stop; a checkpoint to go on from was written first. number: of the signal, 1, 2, 10 or 15.

    No Exception, like KeyboardInterrupt: it may come anywhere, and libraries make errors of their own of those.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"signal {int(number)}")
        self.number = int(number)


@contextmanager
def named(slot: str) -> Iterator[None]:
    """Errors about a value say which slot they come from."""
    try:
        yield
    except NoEffectError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        text = " ".join(str(error).split())
        raise InputError(text if text.startswith(slot) else f"{slot}: {text}") from error

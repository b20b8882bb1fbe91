"""The errors that knep raises for its users: one line each, naming what is wrong, where, and what to write instead."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
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


def is_full(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether there was no room for what should be written: on the disk, in a quota, or within a limit on files."""
    return isinstance(error, OSError) and error.errno in _FULL

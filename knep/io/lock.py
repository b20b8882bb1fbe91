"""One run at a time in a folder; more than a file lock: it names the process that is in it, and since when.

The truth is the kernel's lock on `.lock`: it falls with its process, however that ends, and is not inherited by data
workers. What the file says (process, host, start) is for the line that refuses the second run, and decides where a
file system keeps no locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from knep.errors import InputError
from knep.utils.text import shown

NAME = ".lock"
_MISSES = 100
_NONE_KEPT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Two locks of one process do not exclude each other: files (device, inode) that this process has locked.
_held: dict[tuple[int, int], Path] = {}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other runs out of `folder` within. Raises InputError naming the process that is in it."""
    path = folder / NAME
    handle = _locked(path)
    file = _identity(os.fstat(handle))
    _held[file] = folder
    try:
        os.truncate(handle, 0)
        os.write(handle, json.dumps(_about(os.getpid())).encode())
        yield
    finally:
        # First the name, while the lock keeps others out; then the lock. A forked child leaves both to its parent.
        if _owner(handle).get("pid") == os.getpid():
            with contextlib.suppress(OSError):  # a folder that is gone took it along
                path.unlink()
        os.close(handle)
        _held.pop(file, None)


def folders() -> list[Path]:
    """The folders that this process holds."""
    return list(_held.values())


def _locked(path: Path) -> int:
    """A handle of the lock file, locked."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            if _identity(path.stat()) in _held:
                raise _in_use(path, _about(os.getpid()))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # a refused run has removed its empty folder in between
        except OSError as error:
            what = {errno.ELOOP: "is a link", errno.EISDIR: "is a folder"}.get(error.errno or 0)
            if what is None:
                raise
            raise InputError(f"{shown(path)} {what} where a lock belongs: remove it") from None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(handle)
            alone = error.errno in _NONE_KEPT and not _lives(owner)
            if not alone:
                os.close(handle)
                raise _in_use(path, owner) from None
        with contextlib.suppress(FileNotFoundError):
            if _identity(path.stat()) == _identity(os.fstat(handle)):
                return handle
        os.close(handle)  # its owner removed the name between the opening and the locking


def _in_use(path: Path, owner: dict[str, Any]) -> InputError:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}, since {owner.get('began', '?')}"
    return InputError(
        f"{path.parent} is in use by another run ({who}): wait for it, choose another hydra.run.dir, or remove "
        f"{path} if that process is no more"
    )


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _about(pid: int) -> dict[str, Any]:
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": pid, "host": socket.gethostname(), "began": began, "ticks": _ticks(pid)}


def _owner(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _ticks(pid: object) -> str | None:
    """When a process of this machine started, in clock ticks since boot: tells it from a later one of the same id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock file runs; one of another host is taken to run."""
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    return owner.get("ticks") is not None and _ticks(owner.get("pid")) == owner["ticks"]


def in_use(folder: Path) -> bool:
    """Whether a run is in `folder`."""
    if not (folder / NAME).exists():
        return False
    try:
        with held(folder):
            return False
    except InputError:
        return True


def claimed(folder: Path) -> Path:
    """Makes a new folder, `folder` or the first of `folder`_1, `folder`_2, ... that is free: nobody else gets it.

    Raises InputError where none can be made.
    """
    number = misses = 0
    while True:
        place = folder.with_name(f"{folder.name}_{number}") if number else folder
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.mkdir()
            return place
        except OSError as error:
            taken = isinstance(error, FileExistsError) and place.parent.is_dir()
            # A run that is refused may just have removed the folder that is to hold this one.
            misses += isinstance(error, FileNotFoundError)
            if not taken and not 0 < misses < _MISSES:
                what = f"{error.filename} cannot be written ({error.strerror})"
                raise InputError(f"{what}: choose another folder") from error
            number += taken

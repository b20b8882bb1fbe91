"""What a run folder from somebody else may hold: no way out of it, and no more than is read in one go."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from knep.errors import InputError
from knep.utils.text import shown

_MOST_BYTES = 1 << 20
_MOST_ENTRIES = 100_000
_FILES = frozenset({".ckpt", ".csv", ".html", ".json", ".log", ".part", ".patch", ".png", ".pt", ".txt", ".yaml"})
_FOLDERS = ("checkpoints", "tensorboard", "figures", "profile")
_NAMES = frozenset({".lock", ".jobs", *_FOLDERS})


def check_folder(folder: Path) -> None:
    """What a run writes in a run folder must land there, and what it reads must have an end.

    Raises InputError for a symbolic link that leads outside or in a circle, a folder where a file belongs, and what is
    neither file nor folder.
    """
    inside, seen = folder.resolve(), 0
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(here, name)
            seen += 1
            if seen > _MOST_ENTRIES:
                raise InputError(f"{shown(folder)} has more than {_MOST_ENTRIES:,} files: give a run folder")
            if path.is_symlink():
                _check_link(path, inside)
            elif path.is_dir() and _is_file(path):
                raise _no_file(path)
            check_kind(path)


def check_written(folder: Path) -> None:
    """The files that a run or a sweep writes in a folder that is there already.

    Raises InputError for a link that leads outside, a folder in the place of a file, a pipe, a socket or a device.
    """
    inside = folder.resolve()
    for run in (folder, *folder.glob("member_*")):
        for place in (run, *(run / name for name in _FOLDERS)):
            for path in place.iterdir() if place.is_dir() else ():
                if place == run and not (_is_file(path) or path.name in _NAMES or path.match("member_*")):
                    continue
                if path.is_symlink():
                    _check_link(path, inside)
                elif path.is_dir() and _is_file(path):
                    raise _no_file(path)
                elif place == run and path.name in (*_FOLDERS, ".jobs") and not path.is_dir():
                    raise InputError(f"{shown(path)} is a file where a folder belongs: move it away")
                check_kind(path)


def check_kind(path: Path) -> None:
    """Raises InputError for a named pipe, a socket or a device, which would be waited for, or never end."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # what is not there, or cannot be looked at, its reader tells of
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise InputError(f"{shown(path)} is {kind} where a file belongs: move it away")


def _is_file(path: Path) -> bool:
    """Whether a run writes a file of this name, or a part of one."""
    part = path.name.startswith(".") and path.suffix[1:].isdecimal()
    return path.suffix in _FILES or path.name == ".lock" or part


def _no_file(path: Path) -> InputError:
    return InputError(f"{shown(path)} is a folder where a file belongs: move it away")


def _check_link(path: Path, inside: Path) -> None:
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{shown(path)} is a link that leads back to itself: remove it") from error
    if not path.resolve().is_relative_to(inside):
        raise InputError(f"{shown(path)} is a link that leads outside the run folder: remove it")


def read_lines(path: Path) -> list[str]:
    """The lines of a small text file. Raises InputError for a large one, or one that is no text."""
    return read_text(path, "give a run folder of knep").splitlines()


def read_text(path: Path, remedy: str, most: int = _MOST_BYTES) -> str:
    """A text file of at most so many bytes, whole, without a byte order mark.

    Raises InputError for a larger one, one that is no text, and what is no file at all.
    """
    check_kind(path)
    try:
        with path.open("rb") as f:
            content = f.read(most + 1)
        if len(content) > most:
            raise InputError(f"{shown(path)} has more than {most >> 20} MiB: {remedy}")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(path)} is no UTF-8 text: {remedy}") from error
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read ({error.strerror}): {remedy}") from error

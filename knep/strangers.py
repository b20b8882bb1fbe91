"""What a run folder from somebody else may hold: no way out of it, and no more than is read in one go."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from knep.errors import InputError
from knep.text import shown

_MOST_BYTES = 1 << 20
_MOST_ENTRIES = 100_000
_FILES = frozenset({".ckpt", ".csv", ".html", ".json", ".log", ".png", ".pt", ".txt", ".yaml"})


def check_folder(folder: Path) -> None:
    """What a run writes in a run folder must land there.

    Raises InputError for a symbolic link that leads outside or in a circle, and a folder where a file belongs.
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
            elif path.suffix in _FILES and path.is_dir():
                raise InputError(f"{shown(path)} is a folder where a file belongs: move it away")


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
    with path.open("rb") as f:
        content = f.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise InputError(f"{shown(path)} has more than {_MOST_BYTES:,} bytes: give a run folder of knep")
    try:
        return content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(path)} is no text: give a run folder of knep") from error

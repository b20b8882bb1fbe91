"""What a run folder from somebody else may hold: no way out of it, and no more than is read in one go."""

from __future__ import annotations

import os
from pathlib import Path

from knep.errors import InputError
from knep.text import shown

_MOST_BYTES = 1 << 20
_MOST_ENTRIES = 100_000


def check_folder(folder: Path) -> None:
    """Raises InputError for a symbolic link in a run folder that leads outside: what a run writes would land there."""
    inside, seen = folder.resolve(), 0
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(here, name)
            seen += 1
            if seen > _MOST_ENTRIES:
                raise InputError(f"{shown(folder)} has more than {_MOST_ENTRIES:,} files: give a run folder")
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
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

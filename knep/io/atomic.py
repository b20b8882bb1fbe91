"""Files that readers see whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder as durable as its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str | bytes) -> None:
    """Writes `text` to a temporary name beside `path`, then renames: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new_file(temporary) as f:
            f.write(text.encode() if isinstance(text, str) else text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be gone
            temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def new_file(path: Path) -> BinaryIO:
    """Opens a temporary file, made anew: what lies there already, such as a link out of the folder, is not written."""
    path.unlink(missing_ok=True)
    return path.open("x+b")

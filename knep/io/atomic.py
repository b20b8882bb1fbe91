"""Files that readers see whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder as durable as its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path, mark: str = "", *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file beside `path` to write into, which takes its name at the end: readers see the old file or the new one.

    An error leaves the old one, and nothing beside it. mark: of the file's name meanwhile, by default the process's
    number; durable: the name, too, is on the disk at the end.
    """
    temporary = path.with_name(f".{path.name}.{mark or os.getpid()}")
    try:
        with new_file(temporary) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder itself may be gone
            temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, text: str | bytes) -> None:
    """`path` holds `text`, or what it held before."""
    try:
        with replacing(path, durable=False) as f:
            f.write(text.encode() if isinstance(text, str) else text)
    except OSError as error:
        error.filename = str(path)
        raise


def new_file(path: Path) -> BinaryIO:
    """Opens a temporary file, made anew: what lies there already, such as a link out of the folder, is not written."""
    path.unlink(missing_ok=True)
    return path.open("x+b")

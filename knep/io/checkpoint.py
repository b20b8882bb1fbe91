"""Checkpoint files that are whole or absent: written beside, synced, renamed; their SHA-256 is checked when read.

The checksum is the comment of the zip archive that `torch.save` writes, so that `torch.load` reads the file as ever.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from knep.errors import InputError, RunFailed, is_full
from knep.io.atomic import replacing
from knep.io.pickle_scan import foreign, overlaps
from knep.io.run_folder import no_room

if TYPE_CHECKING:
    from torch.serialization import MAP_LOCATION

_END = b"PK\x05\x06"  # opens the last record of a zip archive; the record ends with the length of the comment
_END_SIZE = 22
_MARK = b"knep sha256 "
# 76 bytes: not a power of two, so that no single bit of the length makes it that of a file without a checksum.
_SEAL_SIZE = len(_MARK) + hashlib.sha256().digest_size * 2
_CHUNK = 1 << 20


class _Noting:
    """A file opened for writing that notes its first error: what torch makes of it does not say what was wrong."""

    error: OSError | None = None

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def write(state: Mapping[str, Any], path: Path) -> None:
    """Saves `state` so that `path` holds the whole of it or what it held before, whenever the process ends.

    The folder is there, or was removed while a run was in it: it is not made again.
    Raises RunFailed where there is no room, or where the folder cannot be written.
    """
    noting: Any = None
    try:
        with replacing(path, "part") as f:
            noting = _Noting(f)
            torch.save(dict(state), noting)
            _seal(f)
    except (OSError, RuntimeError) as error:  # torch reports a write that came up short as a RuntimeError
        raise _failed(path, noting.error if noting and noting.error else error) from error


def copy(source: Path, path: Path) -> None:
    """Makes `path` the same checkpoint as `source`, whole or not at all. Raises RunFailed as `write` does."""
    try:
        with source.open("rb") as whole, replacing(path, "part") as f:
            shutil.copyfileobj(whole, f)
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: Path, error: OSError | RuntimeError) -> RunFailed:
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if is_full(error):
        return no_room(error, path, f"ckpt={folder}")
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return RunFailed(f"{path} cannot be written ({reason}): put that right, then go on with ckpt={folder}")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None: "is empty", "is truncated or damaged".

    A file that `torch.save` wrote alone has no checksum: of it only the end is looked at.
    """
    size = path.stat().st_size
    if not size:
        return "is empty, so truncated"
    with path.open("rb") as f:
        if size >= _END_SIZE:
            f.seek(size - _END_SIZE)
            end = f.read()
            if end.startswith(_END) and end.endswith(b"\0\0"):
                return None
        if size <= _SEAL_SIZE:
            return "is truncated or damaged"
        f.seek(size - _SEAL_SIZE)
        seal = f.read()
        return None if seal == _MARK + _digest(f, size - _SEAL_SIZE) else "is truncated or damaged"


def read(path: Path, map_location: MAP_LOCATION = "cpu") -> Any:
    """The plain data in a checkpoint file, never unpickled. Raises InputError where it is damaged or something else."""
    wrong = damage(path) or foreign(path)
    if wrong:
        raise InputError(f"{path} {wrong}: give another checkpoint")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises what its many readers raise: zip, pickle, runtime, EOF errors
        what = "is truncated or damaged" if not zipfile.is_zipfile(path) else "is not a checkpoint that knep wrote"
        raise InputError(f"{path} {what}: give another checkpoint ({type(error).__name__})") from error


def in_own_memory(tree: object) -> Any:
    """The same data, in which no tensor shares its memory with another, or holds hooks that its file gave it."""
    return _in_own_memory(tree, set())


def _in_own_memory(node: object, taken: set[int]) -> Any:
    if isinstance(node, Tensor):
        storage, t = node.untyped_storage(), node.detach()
        alone = storage.data_ptr() not in taken and storage.nbytes() == t.numel() * t.element_size() and not overlaps(t)
        taken.add(storage.data_ptr())
        return t if alone else t.clone()
    if isinstance(node, dict):
        node.update({k: _in_own_memory(v, taken) for k, v in node.items()})
        return node
    return type(node)(_in_own_memory(v, taken) for v in node) if isinstance(node, (list, tuple)) else node


def _digest(f: IO[bytes], size: int) -> bytes:
    """SHA-256 of the first `size` bytes, in hex."""
    f.seek(0)
    digest = hashlib.sha256()
    while size > 0:
        chunk = f.read(min(_CHUNK, size))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()


def _seal(f: IO[bytes]) -> None:
    """Appends the checksum of what was written as the archive's comment."""
    f.flush()
    size = f.seek(0, os.SEEK_END)
    f.seek(size - 2)
    f.write(_SEAL_SIZE.to_bytes(2, "little"))
    f.flush()
    seal = _MARK + _digest(f, size)
    f.seek(size)
    f.write(seal)


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints through `write` and `read`; folder: of the run, which is there or was removed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: object = None
    ) -> None:
        if not Path(path).is_relative_to(self._folder):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: MAP_LOCATION = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return in_own_memory(read(Path(path), map_location))

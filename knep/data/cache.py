"""A folder's images at the training size in one memory-mapped file, checksummed, written whole or not at all.

Layout: pixels uint8 (N, C, S, S) from byte 0; a CRC-32 per image, uint32 (N,); a head that says which images at which
size these are; a CRC-32 of the two before. An image's checksum is checked when it is first read: its bytes are in
the processor's cache then, and a file of many gigabytes opens at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from knep.data.decode import read_image
from knep.data.loaders import Batch, labels
from knep.errors import InputError
from knep.io.atomic import replacing
from knep.io.untrusted_folder import check_kind
from knep.utils.text import shown

_HEAD = struct.Struct("<8sQIII32s")
_MAGIC = b"knepimg2"  # another number wherever a file comes to be decoded otherwise


@dataclass(frozen=True)
class Source:
    """What a cache holds: these files at `channels` x `size` x `size`; stamp: a hash of names, sizes and times.

    bits: of numbers that have more than 8, as `check_headers` found them; 0 where there are none, None where a cache is
    to tell.
    """

    files: Sequence[Path]
    channels: int
    size: int
    stamp: bytes
    bits: int | None = None

    @property
    def pixels(self) -> int:
        """Bytes of all images."""
        return len(self.files) * self.channels * self.size**2

    @property
    def head(self) -> bytes:
        return _HEAD.pack(_MAGIC, len(self.files), self.channels, self.size, self.bits or 0, self.stamp)

    def bits_of(self, head: bytes) -> int | None:
        """The bits that a cache's head tells, or None where it is the head of another source."""
        bits = _HEAD.unpack(head)[4]
        return bits if self.bits in (None, bits) and replace(self, bits=bits).head == head else None

    @property
    def length(self) -> int:
        """Bytes of the whole file."""
        return self.pixels + 4 * len(self.files) + _HEAD.size + 4


def source_of(root: Path, files: Sequence[Path], channels: int, size: int) -> Source:
    """The source as it lies on the disk now. Raises InputError for a file that is gone."""
    digest = hashlib.sha256()
    for path in files:
        try:
            facts = path.stat()
        except OSError as error:
            raise InputError(f"{shown(path)} is missing: put it back, or start again without it") from error
        line = f"{facts.st_size}\0{facts.st_mtime_ns}\0".encode()
        digest.update(os.fsencode(path.relative_to(root)) + b"\0" + line)
    return Source(files, channels, size, digest.digest())


def cache_path(root: Path, folder: Path | None, channels: int, size: int) -> Path:
    """Where the cache of `root` lies: in `folder`, or in the user's cache folder for None.

    Not in `root`, where other programs would take it for a class.
    """
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knep" / "images"
    # One folder may hold the caches of many sources.
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:12]
    return folder / f"{key}-{channels}x{size}x{size}.images"


class Cache:
    """All images of a source as a private memory map; `take` reads and checks. Open one with `open_cache`."""

    def __init__(self, path: Path, source: Source, sums_N: np.ndarray, max_pixels: int, writable: bool = True) -> None:
        self.path, self._source, self._sums, self._max_pixels = path, source, sums_N, max_pixels
        self._writable = writable
        shape = (len(source.files), source.channels, source.size, source.size)
        mapped = torch.from_file(str(path), shared=False, size=source.pixels, dtype=torch.uint8)
        self._x_NCHW = mapped.view(shape)
        self._bytes = mapped.view(len(source.files), -1).numpy()
        self._seen = torch.zeros(len(source.files), dtype=torch.bool)
        self._damaged = False

    @property
    def bits(self) -> int | None:
        """Of numbers that have more than 8; None where no image has such."""
        return self._source.bits or None

    def take(self, rows: Tensor) -> Tensor:
        """uint8 (n, C, S, S) of these images; one whose checksum is wrong is decoded from its file again."""
        for row in rows[~self._seen[rows]].tolist():
            if zlib.crc32(self._bytes[row].data) != self._sums[row]:
                self._mend(row)
        self._seen[rows] = True
        return self._x_NCHW.index_select(0, rows)

    def _mend(self, row: int) -> None:
        """Puts right this process's view of an image; a writable file is removed: the next run makes another."""
        file, source = self._source.files[row], self._source
        self._x_NCHW[row] = read_image(file, source.channels, source.size, self._max_pixels, source.bits or 16)
        if self._damaged:
            return
        self._damaged = True
        said = f"knep: {shown(self.path)} is damaged at {shown(file)}: damaged images are decoded again"
        if not self._writable:
            print(said, file=sys.stderr)
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            print(f"{said}; it cannot be removed ({error.strerror})", file=sys.stderr)
        else:
            print(f"{said}, and the next run writes the cache anew", file=sys.stderr)


class CachedImages:
    """Whole batches out of a cache, like `Images` but without decoding. rows_N: where each image lies in the cache."""

    def __init__(self, cache: Cache, rows_N: Tensor, y_N: Tensor) -> None:
        self._cache, self._rows, self.y_N = cache, rows_N, y_N

    def __len__(self) -> int:
        return len(self.y_N)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._cache.take(self._rows[torch.from_numpy(batch[0])]), labels(self.y_N, batch)


def open_cache(path: Path, source: Source, max_pixels: int, writable: bool = True) -> Cache | None:
    """The cache at `path` if it is whole and holds this source as it is now, else None.

    writable: whether it may be removed where it is found damaged.
    """
    if not path.is_file():  # a named pipe would be waited for
        return None
    try:
        with path.open("rb") as f:
            if os.fstat(f.fileno()).st_size != source.length:
                return None
            f.seek(source.pixels)
            tail = f.read()
    except OSError:  # unreadable: to be built, and building says what is in the way
        return None
    body, checksum = tail[:-4], tail[-4:]
    if struct.pack("<I", zlib.crc32(body)) != checksum:
        return None
    bits = source.bits_of(body[-_HEAD.size :])
    if bits is None:
        return None
    return Cache(
        path, replace(source, bits=bits), np.frombuffer(body[: -_HEAD.size], dtype="<u4"), max_pixels, writable
    )


def build_cache(path: Path, source: Source, images: Iterable[tuple[Tensor, Tensor]], max_pixels: int) -> Cache:
    """Writes the cache unless another process has done so meanwhile, and opens it.

    images: all of the source in its order, in batches. Raises InputError where it cannot be written or an image read.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            ready = open_cache(path, source, max_pixels)
            if ready is None:
                _write(path, source, images)
                ready = open_cache(path, source, max_pixels)
    except OSError as error:
        raise InputError(
            f"the image cache {shown(path)} of {source.length / 1e6:,.0f} MB cannot be written ({error.strerror}): "
            "write data.cache=FOLDER for a place with room, or data.cache=false"
        ) from error
    if ready is None:
        raise InputError(f"the image cache {shown(path)} is not what was written: write data.cache=FOLDER for "
                         "another place, or data.cache=false")  # fmt: skip
    return ready


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits for any other process that builds this cache, and clears away what killed ones left."""
    place = path.with_name(f"{path.name}.lock")
    check_kind(place)
    if place.is_symlink():
        raise InputError(f"{shown(place)} is a link where a lock belongs: remove it")
    with place.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink(missing_ok=True)
        yield


def _write(path: Path, source: Source, images: Iterable[tuple[Tensor, Tensor]]) -> None:
    print(
        f"knep: caching {len(source.files):,} images, {source.length / 1e6:,.0f} MB, in {shown(path)}", file=sys.stderr
    )
    sums: list[int] = []
    with replacing(path) as f:
        # A disk without room says so here, before hours of decoding.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, source.length)
        for x, _ in images:
            rows = x.reshape(len(x), -1).numpy()
            sums += [zlib.crc32(row.data) for row in rows]
            f.write(rows.data)
        body = np.array(sums, dtype="<u4").tobytes() + source.head
        f.write(body + struct.pack("<I", zlib.crc32(body)))

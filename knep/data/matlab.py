"""MATLAB's files of version 5, as much as SVHN needs: arrays of bytes, unpacked no further than their header says.

scipy's reader is no help against a lying file: it takes memory for what an element declares, and goes as deep as cells
within cells are nested (MathWorks, MAT-File Format, 1996-2018).
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np

_ARRAY, _PACKED, _BYTES = 14, 15, 2
_CLASS_BYTES = 9
_HEADER, _TAG = 128, 8
_START = 512  # bytes that hold any sane header of an array


def read_bytes_arrays(path: Path, names: tuple[str, ...], most: int) -> dict[str, np.ndarray]:
    """The uint8 arrays of these names, in MATLAB's order of axes. most: bytes that an array may have.

    Raises ValueError for what is no such file, OSError where it cannot be read.
    """
    found: dict[str, np.ndarray] = {}
    with path.open("rb") as f:
        header = f.read(_HEADER)
        if len(header) < _HEADER or header[126:] != b"IM":
            raise ValueError("it is no MATLAB file of version 5")
        while len(found) < len(names) and len(tag := f.read(_TAG)) == _TAG:
            kind, size = struct.unpack("<II", tag)
            if f.tell() + size > path.stat().st_size:
                raise ValueError("it is truncated")
            named = _element(kind, f.read(size), names, most)
            if named:
                found[named[0]] = named[1]
            elif kind not in (_ARRAY, _PACKED):
                f.seek(-size % 8, 1)
    return found


def _element(kind: int, content: bytes, names: tuple[str, ...], most: int) -> tuple[str, np.ndarray] | None:
    """A wanted array with its name, or None for any other element."""
    if kind == _PACKED:
        unpack = zlib.decompressobj()
        start = unpack.decompress(content, _START)
        kind = struct.unpack_from("<I", start)[0] if len(start) >= _TAG else 0
        start = start[_TAG:]
    else:
        unpack, start = None, content
    if kind != _ARRAY:
        return None
    at = 0
    _, flags, at = _part(start, at)
    _, sizes, at = _part(start, at)
    _, name, at = _part(start, at)
    shape = struct.unpack(f"<{len(sizes) // 4}i", sizes)
    if name.decode("latin1") not in names or flags[0] != _CLASS_BYTES or min(shape) < 0:
        return None
    count = math.prod(shape)
    if count > most:
        raise ValueError(f"its header promises {count:,} bytes, more than {most:,}")
    if unpack is not None:
        start += unpack.decompress(unpack.unconsumed_tail, max(1, count + 64 - len(start)))
    kind, values, _ = _part(start, at)
    if kind != _BYTES or len(values) != count:
        raise ValueError(f"{count:,} bytes are promised, and it holds others")
    return name.decode("latin1"), np.frombuffer(values, dtype=np.uint8).reshape(shape, order="F")


def _part(content: bytes, at: int) -> tuple[int, bytes, int]:
    """Kind, content and end of the part of an array that begins at a byte."""
    kind, size = struct.unpack_from("<II", content, at)
    if kind >> 16:  # up to four bytes lie in the tag itself
        return kind & 0xFFFF, content[at + 4 : at + 4 + min(4, kind >> 16)], at + _TAG
    end = at + _TAG + size
    return kind, content[at + _TAG : end], end + -size % 8

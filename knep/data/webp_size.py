"""The size of a WebP by its header (RFC 9649): its reader takes memory for the canvas as soon as the file is opened."""

from __future__ import annotations

import struct
from pathlib import Path

HEADER = 30


def canvas(path: Path) -> tuple[int, int] | None:
    """Width and height in pixels, or None for what is no WebP."""
    with path.open("rb") as f:
        return canvas_of(f.read(HEADER))


def canvas_of(head: bytes) -> tuple[int, int] | None:
    """`canvas` by the first 30 bytes of a file."""
    if len(head) < HEADER or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    kind, body = head[12:16], head[20:]
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", body, 1)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None

"""Which readers of Pillow are in use, and what the head and the end of a file tell before its pixels are decoded."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from PIL import Image

# Other readers of Pillow stay shut, whatever a file's name says: some of them start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif"})
# These are opened only where the name says so as well: many cameras and scripts write them, few websites do.
BY_SUFFIX = {
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".pbm": "PPM",
    ".pgm": "PPM",
    ".pnm": "PPM",
    ".ppm": "PPM",
}
_NAMES = {"WEBP": "WebP"}
_ENTRIES = 512  # of a TIFF's directory, which is read as a whole when the file is opened
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def formats_of(name: str) -> tuple[str, ...]:
    """What a file of this name may be, told by its content."""
    more = BY_SUFFIX.get(os.path.splitext(name)[1].lower())
    return (*FORMATS, more) if more else FORMATS


def spelled(formats: tuple[str, ...]) -> str:
    *some, last = (_NAMES.get(f, f) for f in formats)
    return f"{', '.join(some)} or {last}"


def suffix_of(file: BinaryIO) -> str:
    """The suffix without which a file of this content stays shut, or ""."""
    file.seek(0)
    head = file.read(4)
    starts = {b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif"} | {b"P%d" % k: ".ppm" for k in range(1, 7)}
    return next((suffix for start, suffix in starts.items() if head.startswith(start)), "")


def check_directory(file: BinaryIO) -> None:
    """Raises ValueError for a TIFF whose directory has so many entries that reading them takes for ever."""
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is not None and len(head) == 16:
        large = struct.unpack_from(f"{order}H", head, 2)[0] == 43
        (at,) = struct.unpack_from(f"{order}{'Q' if large else 'I'}", head, 8 if large else 4)
        size = 8 if large else 2
        file.seek(min(at, 1 << 62))
        count = file.read(size)
        if len(count) == size and struct.unpack(f"{order}{'Q' if large else 'H'}", count)[0] > _ENTRIES:
            raise ValueError(f"its directory has more than {_ENTRIES} entries")
    file.seek(0)


def ends_whole(file: BinaryIO, kind: str) -> bool:
    """Whether the end of a file is what its format ends in; False where only decoding can tell."""
    length = os.fstat(file.fileno()).st_size
    here = file.tell()
    file.seek(max(0, length - len(_PNG_END)))
    tail = file.read(len(_PNG_END))
    file.seek(0)
    head = file.read(8)
    file.seek(here)
    if kind in ("JPEG", "MPO"):
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail == _PNG_END
    if kind == "GIF":
        return tail.rstrip(b"\0").endswith(b";")
    return kind == "WEBP" and 8 + struct.unpack("<I", head[4:])[0] <= length


def tile_of(image: Image.Image) -> tuple[int, int]:
    """Width and height of the tiles that a TIFF is decoded in; (0, 0) for one without."""
    tags = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    return int(tags.get(322) or 0), int(tags.get(323) or 0)


HEADER = 30


def canvas_of(head: bytes) -> tuple[int, int] | None:
    """Width and height in pixels, by the first 30 bytes of a file; None for what is no WebP."""
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

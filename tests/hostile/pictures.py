"""Image folders: pictures larger than memory, readers that start programs, links, names with codes in them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.exhaustive.fuzzing.arena import Outcome

from .attack import Attack, Place
from .bombs import bomb
from .runs import a_run, spoilt


def folder(place: Place, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    root = place.work / "images"
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (40 * k + i, 0, 0)).save(root / name / f"{i}.png")
    return root


def arguments(root: Path) -> list[str]:
    return ["image_folder", f"data.root={root}", "data.size=16", "data.batch_size=4", "data.workers=0"]


def picture(content: Callable[[Place], bytes], name: str = "3.png") -> Attack:
    """A folder of class folders in which one file is this."""

    def build(place: Place) -> list[str]:
        root = folder(place)
        (root / "ant" / "3.png").unlink()
        (root / "ant" / name).write_bytes(content(place))
        return arguments(root)

    return Attack("read", build, name)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes, colour: int = 2, depth: int = 8, data: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", data or zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def tiff(tags: dict[int, int]) -> bytes:
    """A TIFF of 16 x 16 grey pixels, with these tags in the place of its own."""
    held = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 16, 279: 256} | tags
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(held.items()))
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(held)) + rows + bytes(4)
    return head.ljust(200, b"\0") + bytes(256)


def bmp(width: int, height: int, depth: int = 24, packing: int = 0) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, depth, packing, 0, 0, 0, 0, 0)
    table = bytes(4 << depth) if depth <= 8 else b""
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54 + len(table)) + head + table + b"\0\1"


def zeros(size: int) -> bytes:
    return bomb(b"", size)


def within(kind: str, mode: str = "RGB", side: int = 7900, **options: Any) -> Callable[[Place], bytes]:
    """A picture of one colour with just as many pixels as are allowed."""

    def make(place: Place) -> bytes:
        made = io.BytesIO()
        Image.new(mode, (side, side)).save(made, kind, **options)
        return made.getvalue()

    return make


def large(kind: str, mode: str = "RGB", deep: bool = False, **options: Any) -> Attack:
    """It may be read or refused: what counts is the memory that it takes. deep: a PNG of 16 bits a colour."""

    def build(place: Place) -> list[str]:
        root = folder(place)
        suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
        made = (
            png(4900, 4900, depth=16, data=zlib.compress(bytes(4900 * (1 + 6 * 4900)), 1))
            if deep
            else within(kind, mode, **options)(place)
        )
        (root / "ant" / f"large.{suffix}").write_bytes(made)
        return arguments(root)

    return Attack("read", build, tamed=lambda place, outcome: "", refusal=True, heavy=True)


def linked(make: Callable[[Place, Path], None], said: str = "link") -> Attack:
    def build(place: Place) -> list[str]:
        root = folder(place)
        make(place, root)
        return arguments(root)

    return Attack("read", build, said)


CODES = "bee\x1b]0;owned\x07\x1b[2J\u202eeeb\n<script>alert(1)</script>$\\frac{"


def quiet(place: Place, outcome: Outcome) -> str:
    if "\u202e" in outcome.out + outcome.err:
        return "text is turned round on the terminal"
    events = b"".join(p.read_bytes() for p in place.work.rglob("events.out.*"))
    return "HTML reaches TensorBoard" if b"<script" in events else ""


def named_classes(place: Place) -> list[str]:
    root = folder(place, ("ant", CODES.replace("/", "_")))
    return ["recipe=none", *["data=image_folder", *arguments(root)[1:]]]


def stored_names(place: Place) -> list[str]:
    names = [CODES] * 10
    run = spoilt(place, lambda state: state["knep"].update(class_names=names))
    Image.new("L", (8, 8)).save(place.work / "a.png")
    return ["predict", *run, str(place.work / "a.png")]


def predicted(place: Place) -> list[str]:
    path = place.work / "a\x1b[2J.png"
    Image.new("L", (8, 8)).save(path)
    return ["predict", str(a_run(place)), str(path)]


def typed(place: Place) -> list[str]:
    return ["recipe=none", "data.limit=100", "data.batch_size=50", "data.root='<script>alert(1)</script>'"]


def fifo(place: Place, root: Path) -> None:
    os.mkfifo(root / "ant" / "pipe.png")
    (root / "ant" / "out.png").symlink_to("/dev/zero")


ATTACKS = {
    "picture: a PNG of 2 billion a side": picture(lambda p: png(2**31 - 1, 2**31 - 1)),
    "picture: a PNG just too large": picture(lambda p: png(8001, 8001)),
    "picture: a PNG of no width": picture(lambda p: png(0, 16)),
    "picture: text that unpacks to 1 GB": picture(lambda p: png(16, 16, chunk(b"zTXt", b"a\0\0" + zeros(1 << 30)))),
    "picture: profile that unpacks to 1 GB": picture(lambda p: png(16, 16, chunk(b"iCCP", b"a\0\0" + zeros(1 << 30)))),
    "picture: a chunk of 4 GB declared": picture(lambda p: png(16, 16)[:33] + b"\xff\xff\xff\xfftEXta\0b"),
    "picture: pixels that end early": picture(lambda p: png(4000, 4000, data=zeros(1 << 20)[:100])),
    "picture: PostScript": picture(lambda p: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(w) file\n", "e.png"),
    "picture: TIFF of terabytes": picture(lambda p: b"II*\0\x08\0\0\0" + b"\xff" * 64, "t.png"),
    "picture: TIFF by its ending": picture(within("TIFF", side=16), "t.gif"),
    "picture: PSD": picture(lambda p: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3), "p.jpg"),
    "picture: ICO": picture(within("ICO", side=16), "i.png"),
    "picture: GIF of 65535 a side": picture(lambda p: b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b";", "g.gif"),
    "picture: GIF whose frame is larger": picture(
        lambda p: b"GIF89a\x10\0\x10\0\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x4c\x01\0;", "g.gif"
    ),
    "picture: WebP of 16383 a side": picture(
        lambda p: b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(9), "w.webp"
    ),
    "picture: JPEG of 65500 a side": picture(
        lambda p: within("JPEG", side=16)(p).replace(struct.pack(">HH", 16, 16), b"\xff\xdc\xff\xdc", 1), "j.jpg"
    ),
    "picture: TIFF of terabytes by its name": picture(lambda p: b"II*\0\x08\0\0\0" + b"\xff" * 64, "t.tif"),
    "picture: TIFF of 60000 a side": picture(lambda p: tiff({256: 60_000, 257: 60_000}), "t.tif"),
    "picture: TIFF of a tile of 60000 a side": picture(
        lambda p: tiff({322: 60_000, 323: 60_000, 324: 8, 325: 64, 259: 5}), "t.tif"
    ),
    "picture: TIFF whose directory is 65535 entries of a megabyte": picture(
        lambda p: b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 700, 1, 1 << 20, 0) * 65535, "t.tif"
    ),
    "picture: TIFF whose strip lies nowhere": picture(lambda p: tiff({273: 1 << 31, 279: 1 << 30}), "t.tif"),
    "picture: TIFF of fractions": picture(within("TIFF", "F", side=16), "t.tif"),
    "picture: BMP of 2 billion a side": picture(lambda p: bmp(2**31 - 1, 2**31 - 1), "b.bmp"),
    "picture: BMP of 2 billion upside down": picture(lambda p: bmp(16, -(2**31)), "b.bmp"),
    "picture: BMP packed to nothing": picture(lambda p: bmp(7900, 7900, 8, 1), "b.bmp"),
    "picture: PPM of 60000 a side": picture(lambda p: b"P6 60000 60000 255\n", "p.ppm"),
    "picture: PPM of a number without end": picture(lambda p: b"P6 " + b"9" * 100_000, "p.ppm"),
    "picture: PPM of text that ends early": picture(lambda p: b"P3 7900 7900 255\n1 2", "p.ppm"),
    "picture: PostScript by a TIFF's name": picture(lambda p: b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\n", "e.tif"),
    "picture: empty": picture(lambda p: b""),
    "picture: large PNG": large("PNG"),
    "picture: large PNG with transparency": large("PNG", "RGBA"),
    "picture: large PNG of grey with transparency": large("PNG", "LA"),
    "picture: large PNG of 16 bits": large("PNG", "I;16"),
    "picture: large PNG of a palette": large("PNG", "P", transparency=0),
    "picture: large PNG with a transparent colour": large("PNG", "RGB", transparency=(0, 0, 0)),
    "picture: large PNG of 48 bits": large("PNG", deep=True),
    "picture: large TIFF": large("TIFF"),
    "picture: large TIFF, packed": large("TIFF", compression="tiff_lzw"),
    "picture: large TIFF of four colours": large("TIFF", "CMYK"),
    "picture: large TIFF of 32 bits": large("TIFF", "I"),
    "picture: large BMP": large("BMP"),
    "picture: large PPM": large("PPM"),
    "picture: large GIF": large("GIF", "P"),
    "picture: large GIF with transparency": large("GIF", "P", transparency=0),
    "picture: large WebP": large("WEBP", quality=1, method=0),
    "picture: large WebP with transparency": large("WEBP", "RGBA", quality=1, method=0),
    "picture: large progressive JPEG": large("JPEG", progressive=True, subsampling=0),
    "picture: large progressive JPEG of four colours": large("JPEG", "CMYK", progressive=True, subsampling=0),
    "links: a file outside": linked(lambda p, r: (r / "ant" / "x.png").symlink_to(p.secret)),
    "links: a class outside": linked(lambda p, r: (r / "cow").symlink_to(p.outside)),
    "links: in a circle": linked(lambda p, r: (r / "ant" / "x.png").symlink_to("x.png")),
    "links: to a folder above": linked(lambda p, r: (r / "cow").symlink_to("../..")),
    "links: an endless device": linked(fifo),
    "names: codes and HTML in class folders": Attack("train", named_classes, tamed=quiet),
    "names: codes and HTML in a checkpoint": Attack("command", stored_names, tamed=quiet),
    "names: codes in an image's name": Attack("command", predicted, tamed=quiet),
    "names: HTML in a config": Attack("train", typed, tamed=quiet),
}  # fmt: skip

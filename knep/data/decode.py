"""Image files to pixels: headers and ends checked first, JPEG decoded at reduced size, whole batches at once."""

from __future__ import annotations

import os
import stat
import struct
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from knep.data.formats import HEADER, canvas_of, check_directory, ends_whole, formats_of, spelled, suffix_of, tile_of
from knep.errors import InputError
from knep.utils.text import shown

MAX_PIXELS = 64_000_000
_MAX_TEXT = 32 << 20  # bytes that a PNG's profile or text may unpack to: Pillow's 1 MB refuses what browsers show
_PLAIN_COST, _WEBP_COST, _WIDE_COST = 7, 16, 18  # bytes a pixel; 7 are 450 MB at MAX_PIXELS
_WIDE = 16  # bits of a number where nothing says fewer
BITS = range(8, 33)  # of which the upper 8 are kept
_DEEP = ("PNG", "TIFF")  # formats with colours of 16 bits, of which Pillow keeps 8
_NAMED = 3  # broken files named in one line
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How Pillow names the bytes of colours of 16 bits, of which it keeps the upper one -> a name for which it keeps the
# lower one; grey with opacity as if its four bytes were four colours.
_LOWER = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if struct.pack("=H", 1)[0] else "L"))
} | {"LA;16B": "RGBA"}


@dataclass(frozen=True)
class Bad:
    """A file that gives no pixels: what is wrong with it, and what to do."""

    path: Path
    what: str
    remedy: str = "repair or remove it"

    def __str__(self) -> str:
        return f"{shown(self.path)} {self.what}: {self.remedy}"


class BadImage(InputError):
    """Raised for one such file."""

    def __init__(self, bad: Bad) -> None:
        super().__init__(str(bad))
        self.bad = bad

    def __reduce__(self) -> tuple[type[BadImage], tuple[Bad]]:
        return BadImage, (self.bad,)


def read_image(path: Path, channels: int, size: int, max_pixels: int = MAX_PIXELS, bits: int = _WIDE) -> Tensor:
    """uint8 (channels, size, size): the centre square, resized, upright, its first frame, transparency on white.

    channels: 1 (grey) or 3 (RGB); bits: that numbers of more than 8 bits have, of which the upper 8 are kept. Raises
    InputError naming the file: unreadable, or of more than `max_pixels`.
    """
    return read_images([path], channels, size, max_pixels, bits)[0]


def read_images(
    paths: Sequence[Path], channels: int, size: int, max_pixels: int = MAX_PIXELS, bits: int = _WIDE
) -> Tensor:
    """uint8 (N, channels, size, size): `read_image` of each path, in one piece of memory."""
    x_NHWC = np.empty((len(paths), size, size, channels), dtype=np.uint8)
    with _quiet():
        for pixels, path in zip(x_NHWC, paths, strict=True):
            with _opened(path, max_pixels) as (image, file):
                pixels[:] = np.asarray(_square(image, file, channels, size, bits)).reshape(pixels.shape)
    return torch.from_numpy(x_NHWC).permute(0, 3, 1, 2).contiguous()


def unreadable(paths: Iterable[Path], channels: int, size: int, max_pixels: int, bits: int) -> list[Bad]:
    """Those of the files that `read_image` refuses."""
    found = []
    for path in paths:
        try:
            read_image(path, channels, size, max_pixels, bits)
        except BadImage as error:
            found.append(error.bad)
    return found


def check_headers(paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> int | None:
    """Opens every file and reads its header and its end, about 30 microseconds each; what does not end as its format
    does is decoded, and so are numbers of more than 8 bits.

    Returns the bits that the largest of those needs, at least 8, or None where there are none. Raises InputError for
    all bad files at once.
    """
    bad, largest = [], -1
    with _quiet():
        for path in paths:
            try:
                largest = max(largest, _largest(path, max_pixels))
            except BadImage as error:
                bad.append(error.bad)
    if bad:
        raise refusal(bad, len(paths))
    return None if largest < 0 else max(8, largest.bit_length())


def _largest(path: Path, max_pixels: int) -> int:
    """The largest number of an image of more than 8 bits, -1 for another. Raises BadImage where it is not whole."""
    with _opened(path, max_pixels) as (image, file):
        numbers = _numbers(image, file)
        if numbers is not None:
            return int(numbers[..., :3].max())
        if not ends_whole(file, str(image.format)):
            image.draft("L", (1, 1))
            image.load()
    return -1


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of nothing that it reads all the same, and takes longer texts in a PNG."""
    limit, PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_CHUNK, _MAX_TEXT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK = limit


def refusal(bad: Sequence[Bad], total: int) -> InputError:
    """The error for bad files among `total`: names some, counts all, and lists all in a file."""
    if len(bad) == 1:
        return BadImage(bad[0])
    some = "; ".join(f"{shown(b.path)} {b.what}" for b in bad[:_NAMED])
    rest = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return InputError(f"{len(bad)} of {total} images are refused: {some}{rest}{_listed(bad)}: repair or remove them")


def _listed(bad: Sequence[Bad]) -> str:
    """Where all bad files are listed, one a line."""
    with suppress(OSError):
        handle, name = tempfile.mkstemp(prefix="knep_refused_", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{b}\n" for b in bad)
        return f"; all are listed in {name}"
    return ""


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image with no pixel decoded yet, and its file; what goes wrong here or in the `with` block is a BadImage."""
    formats = formats_of(path.name)
    try:
        with open(path, "rb", opener=_at_once) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode) or not facts.st_size:
                raise ValueError("it is empty" if stat.S_ISREG(facts.st_mode) else "it is no file")
            before = canvas_of(file.read(HEADER))
            if before is not None:
                _check_size(path, before, _WEBP_COST, max_pixels)
            if "TIFF" in formats:
                check_directory(file)
            with _told(path, file, formats) as image:
                cost = _cost(image)
                _check_size(path, image.size, cost, max_pixels)
                if image.format == "TIFF":
                    _check_size(path, tile_of(image), cost, max_pixels)
                yield image, file
    except BadImage:
        raise
    except FileNotFoundError as error:
        raise BadImage(Bad(path, "is missing", "put it back, or start again without it")) from error
    except Exception as error:  # Pillow raises what its readers raise
        raise BadImage(Bad(path, f"cannot be read as an image ({shown(str(error))[:120]})")) from error


def _told(path: Path, file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """`_header`, with what a file is and is not where no reader knows it."""
    try:
        return _header(file, formats)
    except Image.UnidentifiedImageError as error:
        suffix = suffix_of(file)
        mend = f"rename it to {suffix}" if suffix and suffix not in path.name.lower() else "repair or remove it"
        raise BadImage(Bad(path, f"cannot be read as an image (no {spelled(formats)})", mend)) from error


def _at_once(path: str, flags: int) -> int:
    """Opens without waiting, which a named pipe would have it do for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _check_size(path: Path, size: tuple[int, int], cost: int, max_pixels: int) -> None:
    times = cost / _PLAIN_COST
    if size[0] * size[1] * times > max_pixels:
        counted = f", each counted {times:.1f} times for its memory" if times > 1 else ""
        raise BadImage(
            Bad(
                path,
                f"has {size[0]} x {size[1]} pixels{counted}, more than data.max_pixels={max_pixels}",
                "remove it, or raise data.max_pixels if you trust it",
            )
        )


def _cost(image: Image.Image) -> int:
    """Bytes of memory that decoding and converting takes at its peak, per pixel of the file; measured."""
    if image.format == "WEBP":
        return _WEBP_COST
    if image.mode == "I" or _lower(image) is not None:
        return _WIDE_COST
    if image.has_transparency_data:
        return 12
    return 10 if image.mode == "CMYK" else _PLAIN_COST


def _header(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    # Pillow's own limit warns at one size and refuses at another; `max_pixels` stands for both.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(file, formats=formats)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _square(image: Image.Image, file: BinaryIO, channels: int, size: int, bits: int) -> Image.Image:
    """The centre square at `size` pixels a side, in the mode that `channels` asks for."""
    mode = "L" if channels == 1 else "RGB"
    # JPEG at 1/2, 1/4 or 1/8 comes straight out of its blocks' low frequencies; other formats ignore this.
    image.draft(mode, (size, size))
    narrow = _narrowed(image, file, bits)
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    image = _plain(image if narrow is None else narrow, mode)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if (width, height) != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8 as in EXIF; 1 where the file does not say, or says it unreadably."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, EOFError, struct.error):
        return 1


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """The image in `mode`, or in RGBA where parts are transparent."""
    wanted = "RGBA" if image.has_transparency_data else mode
    return image if image.mode == wanted else image.convert(wanted)


def _narrowed(image: Image.Image, file: BinaryIO, bits: int) -> Image.Image | None:
    """Numbers of `bits` bits by their upper 8, larger ones as the largest; None where Pillow gives 8 bits already."""
    if bits == _WIDE and _lower(image) is not None:
        return None
    numbers = _numbers(image, file)
    if numbers is None:
        return None
    shift = np.array([bits - 8] * 3 + [8], dtype=numbers.dtype)[: numbers.shape[2]]
    shifted = np.right_shift(numbers, shift, out=numbers if numbers.flags.writeable else None)
    narrow = np.minimum(shifted, 255, out=shifted).astype(np.uint8)
    return Image.fromarray(narrow if narrow.shape[2] > 1 else narrow[..., 0])


def _numbers(image: Image.Image, file: BinaryIO) -> np.ndarray | None:
    """(H, W, C) of the whole numbers of an image of more than 8 bits, C being 1, 3, or 4 with opacity; None for others.

    Raises ValueError for fractions and for numbers below zero.
    """
    if image.mode == "F":
        raise ValueError("its numbers are fractions, whose range nothing tells; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        numbers = np.asarray(image)[..., None]
        if image.mode == "I" and int(numbers.min()) < 0:
            raise ValueError("it has numbers below zero; save it with 8 or 16 bits")
        return numbers
    lower = _lower(image)
    if lower is None:
        return None
    numbers = np.asarray(image).astype(np.uint16)
    numbers <<= 8
    with _header(file, (str(image.format),)) as again:
        again.tile = lower
        low = np.asarray(again)
    numbers |= low[..., [1, 1, 1, 3]] if lower[0].args == "RGBA" else low
    return numbers


def _lower(image: Image.Image) -> list[Any] | None:
    """The tiles of a colour image of 16 bits, so that they give the lower 8; None for any other and for one loaded."""
    if image.format not in _DEEP:
        return None
    tiles = []
    for tile in getattr(image, "tile", ()):
        first = tile.args if isinstance(tile.args, str) else tile.args[0] if tile.args else None
        if first not in _LOWER:
            return None
        lower = _LOWER[first]
        tiles.append(tile._replace(args=lower if isinstance(tile.args, str) else (lower, *tile.args[1:])))
    return tiles or None

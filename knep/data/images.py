"""Image files to pixels: headers checked first, JPEG decoded at reduced size, whole batches at once."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from knep.data.webp import canvas
from knep.errors import InputError
from knep.text import shown

MAX_PIXELS = 64_000_000
# Other readers of Pillow stay shut, whatever a file's name says: some of them start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_PLAIN_COST, _WEBP_COST = 7, 16  # bytes a pixel; 7 are 450 MB at MAX_PIXELS
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


def read_image(path: Path, channels: int, size: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """uint8 (channels, size, size): the centre square, resized, upright, its first frame, transparency on white.

    channels: 1 (grey) or 3 (RGB). Raises InputError naming the file: unreadable, or of more than `max_pixels`.
    """
    return read_images([path], channels, size, max_pixels)[0]


def read_images(paths: Sequence[Path], channels: int, size: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """uint8 (N, channels, size, size): `read_image` of each path, in one piece of memory."""
    x_NHWC = np.empty((len(paths), size, size, channels), dtype=np.uint8)
    for pixels, path in zip(x_NHWC, paths, strict=True):
        with _opened(path, max_pixels) as image:
            pixels[:] = np.asarray(_square(image, channels, size)).reshape(pixels.shape)
    return torch.from_numpy(x_NHWC).permute(0, 3, 1, 2).contiguous()


def check_headers(paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> None:
    """Opens every file and reads its header, about 25 microseconds each. Raises InputError naming the first bad one."""
    for path in paths:
        with _opened(path, max_pixels):
            pass


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The image with no pixel decoded yet; what goes wrong, here or in the `with` block, is an InputError."""
    try:
        before = canvas(path)
        if before is not None:
            _check_size(path, before, _WEBP_COST, max_pixels)
        with _header(path) as image:
            _check_size(path, image.size, _cost(image), max_pixels)
            yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{shown(path)} is missing: put it back, or start again without it") from error
    except Exception as error:  # Pillow raises what its readers raise
        what = f"{shown(path)} cannot be read as an image"
        if isinstance(error, Image.UnidentifiedImageError):
            raise InputError(f"{what} (no JPEG, PNG, WebP or GIF): repair or remove it") from error
        raise InputError(f"{what} ({shown(str(error))[:120]}): repair or remove it") from error


def _check_size(path: Path, size: tuple[int, int], cost: int, max_pixels: int) -> None:
    times = cost / _PLAIN_COST
    if size[0] * size[1] * times > max_pixels:
        counted = f", each counted {times:.1f} times for its memory" if times > 1 else ""
        raise InputError(
            f"{shown(path)} has {size[0]} x {size[1]} pixels{counted}, more than data.max_pixels={max_pixels}: "
            "remove it, or raise data.max_pixels if you trust it"
        )


def _cost(image: Image.Image) -> int:
    """Bytes of memory that decoding and converting takes at its peak, per pixel of the file; measured."""
    if image.format == "WEBP":
        return _WEBP_COST
    if image.has_transparency_data:
        return 12
    return 10 if image.mode == "CMYK" else _PLAIN_COST


def _header(path: Path) -> Image.Image:
    # Pillow's own limit warns at one size and refuses at another; `max_pixels` stands for both.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path, formats=_FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _square(image: Image.Image, channels: int, size: int) -> Image.Image:
    """The centre square at `size` pixels a side, in the mode that `channels` asks for."""
    mode = "L" if channels == 1 else "RGB"
    # JPEG at 1/2, 1/4 or 1/8 comes straight out of its blocks' low frequencies; other formats ignore this.
    image.draft(mode, (size, size))
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    image = _plain(image, mode)
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
    """The image in `mode`, or in RGBA where parts are transparent; of 16 bits the upper 8."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    wanted = "RGBA" if image.has_transparency_data else mode
    return image if image.mode == wanted else image.convert(wanted)

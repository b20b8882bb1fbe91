"""Masks as PNG files whose colours number classes, in the size of their images: what `data=image_masks` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from knep.errors import InputError
from knep.utils.text import shown

_OUTSIDE = 255  # of the centre square that the model sees: no class
_CLASSES = 255
_TURN = (0x9E, 0x37, 0x79)  # steps round the colours, so that neighbours differ


def mask_files(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Where the mask of each image goes. Raises InputError for two of one name, and for a file that is there."""
    found = [folder / f"{path.stem}.png" for path in images]
    first: dict[Path, Path] = {}
    for path, image in zip(found, images, strict=True):
        if path in first:
            raise InputError(f"{shown(image)} and {shown(first[path])} would have one mask {path.name}: rename one")
        if path.exists() or path.is_symlink():
            raise InputError(f"{shown(path)} exists already: remove it, or choose another folder for --masks")
        first[path] = image
    return found


def write_mask(path: Path, image: Path, classes_HW: Tensor) -> None:
    """Classes int64 (S, S) of an image's centre square as a palette PNG of the image's size; 255 is beside the square.

    Raises InputError where there are more classes than colours, or the file cannot be written.
    """
    if int(classes_HW.max()) >= _CLASSES:
        raise InputError(f"a PNG numbers {_CLASSES} classes, and the model says more: load it with load_module")
    with Image.open(image) as opened:
        width, height = ImageOps.exif_transpose(opened).size
    side = min(width, height)
    square = Image.fromarray(classes_HW.numpy().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    whole = Image.new("L", (width, height), _OUTSIDE)
    whole.paste(square, (round((width - side) / 2), round((height - side) / 2)))
    whole.putpalette([(k * step) % 256 for k in range(255) for step in _TURN] + [255, 255, 255])  # a colour a number
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.save(path)
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be written ({error.strerror}): choose another folder") from error

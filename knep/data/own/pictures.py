"""Pictures that a table lists, or that lie beside masks: decoded once, at one size, and kept in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from knep.config.budget import check_room
from knep.data.base import Arrays, InMemory
from knep.data.decode import BITS, MAX_PIXELS, check_headers, read_images
from knep.data.listing import KINDS
from knep.data.own.read_csv import read_csv
from knep.data.own.targets import Wanted, columns_of, read_targets
from knep.data.splits import at_random, stratified
from knep.errors import InputError
from knep.utils.text import shown

_IGNORED = 255


class _Pictures(InMemory):
    """What both have in common: size, channels, a share for the test.

    size: pixels of a side of the centre square after resizing; channels: 1 (grey) or 3; test_share: of the rows, in
    (0, 1), by class; max_pixels: a file with more is refused before it takes memory.
    """

    def __init__(
        self,
        *,
        size: int = 64,
        channels: int = 3,
        test_share: float = 0.2,
        max_pixels: int = MAX_PIXELS,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not isinstance(size, int) or size < 8:
            raise InputError(f"data.size={size} must be at least 8 pixels")
        if channels not in (1, 3):
            raise InputError(f"data.channels={channels} must be 1 or 3")
        if not 0 < test_share < 1:
            raise InputError(f"data.test_share={test_share} must be in (0, 1)")
        if not isinstance(max_pixels, int) or max_pixels < 1:
            raise InputError(f"data.max_pixels={max_pixels} must be a whole number of pixels, at least 1")
        self._size, self._channels, self._share, self._most = size, channels, test_share, max_pixels
        self.bits: int | None = None
        self._kept_bits: int | None = None

    def keep(self, facts: Mapping[str, Any]) -> None:
        bits = facts.get("bits", 16)
        if bits not in BITS:
            raise InputError("the checkpoint was not written by knep: its images have no bits, give another one")
        self._kept_bits = bits

    def _decoded(self, files: Sequence[Path]) -> Tensor:
        """uint8 (N, channels, size, size)."""
        need = 3 * len(files) * self._channels * self._size**2
        check_room(need, f"{len(files):,} images of data.size={self._size} need", "write a smaller size")
        found = check_headers(files, self._most)
        self.bits = found if found is None else self._kept_bits or found
        return read_images(files, self._channels, self._size, self._most, self.bits or 16)


class ImageCsv(_Pictures):
    """Pictures that a .csv file names in a column of paths, with a class, labels or numbers for each.

    path: the file; images: its column of paths, which are relative to the file's folder and stay in it; target, task,
    separator, categories, encoding: as for `knep.data.own.csv_table.CsvTable`. The others: as for `_Pictures`.
    Raises InputError for a table that is none, a path or a link that leaves the folder, a picture that is not there.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        images: str = "path",
        target: str | Sequence[str] | None = None,
        task: str = "multiclass",
        separator: str = ";",
        categories: Sequence[str] = (),
        encoding: str = "utf-8",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not isinstance(separator, str) or not separator:
            raise InputError(f"data.separator={separator!r} must be text between two labels, such as ;")
        self._path, self._column, self._target, self._task = path, images, target, task
        self._separator, self._categories, self._encoding = separator, categories, encoding
        self._classes: list[str] | None = None

    def keep(self, facts: Mapping[str, Any]) -> None:
        super().keep(facts)
        if facts.get("target", "class") != "number":
            self._classes = list(facts["class_names"])

    def _arrays(self) -> Arrays:
        if not self._path or not isinstance(self._path, str):
            raise InputError("data.path is missing: write data.path=FILE.csv")
        table = read_csv(Path(self.root or "") / Path(self._path).expanduser(), self._encoding)
        wanted = Wanted(columns_of(self._target), self._task, self._classes, self._categories, self._separator)
        found = read_targets(table, wanted, "data=image_csv")
        cells = table.column(self._column, "data.images")
        files = [_inside(table.path.parent, cells[k]) for k in found.rows.tolist()]
        gone = len(table) - len(files)
        x, y = self._decoded(files), found.y
        _say(f"{shown(table.path.name)}: {len(files):,} images" + (f", {gone:,} more without a target" if gone else ""))
        classes = y.ndim == 1 and not y.is_floating_point()
        stay, off = (
            stratified(y, self._share, self.split_seed) if classes else at_random(len(y), self._share, self.split_seed)
        )
        return Arrays(x[stay], y[stay], x[off], y[off], found.names)


class ImageMasks(_Pictures):
    """Pictures in root/images, and in root/masks a picture of the same name for each, whose grey levels are classes.

    Both are cut to the same centre square, masks without mixing two classes. classes: their names, in order; None
    counts them. 255 is left out of loss and metrics. The others: as for `_Pictures`.
    Raises InputError for a picture without mask, or a mask without picture, of another size, or in colours.
    """

    def __init__(self, *, classes: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self._names = None if classes is None else [str(name) for name in classes]

    def keep(self, facts: Mapping[str, Any]) -> None:
        super().keep(facts)
        self._names = list(facts["class_names"])

    def _arrays(self) -> Arrays:
        if self.root is None:
            raise InputError("data=image_masks needs data.root=FOLDER with the folders images and masks")
        images, masks = (_stems(Path(self.root) / name) for name in ("images", "masks"))
        for one, other, what in ((images, masks, "mask"), (masks, images, "image")):
            alone = sorted(set(one) - set(other))
            if alone:
                raise InputError(
                    f"{shown(one[alone[0]])} has no {what} of its name ({len(alone):,} such): add or remove it"
                )
        stems = sorted(images)
        x = self._decoded([images[stem] for stem in stems])
        y = torch.stack([read_mask(masks[stem], images[stem], self._size, self._most) for stem in stems])
        known = y[y != _IGNORED]
        count = int(known.max()) + 1 if len(known) else 0
        if count < 2:
            beside = ", and 255, which is left out" if len(known) < y.numel() else ""
            raise InputError(
                f"the masks hold no class but 0{beside}: save each class by its number, such as 1 where 255 stands"
            )
        names = self._names or [f"class {k}" for k in range(max(2, count))]
        if count > len(names):
            raise InputError(
                f"the masks have the class {count - 1}, and {len(names)} are named: name it in data.classes"
            )
        _say(f"{len(stems):,} images with masks of {len(names)} classes; 255 is left out of loss and metrics")
        stay, off = at_random(len(y), self._share, self.split_seed)
        return Arrays(x[stay], y[stay], x[off], y[off], names)


def read_mask(path: Path, image: Path, size: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """int64 (size, size): the classes in the centre square of a PNG of grey levels or of a palette, by nearest pixels.

    Grey levels may be saved as colours that are all greys.
    Raises InputError for a file that is none, in colours, or of another size than its image.
    """
    try:
        with Image.open(image) as picture, Image.open(path, formats=("PNG",)) as mask:
            width, height = mask.size
            if width * height > max_pixels:
                raise InputError(
                    f"{shown(path)} has {width} x {height} pixels, more than data.max_pixels={max_pixels}: remove it"
                )
            if mask.size != picture.size:
                raise InputError(
                    f"{shown(path)} has {width} x {height} pixels and its image {picture.size[0]} x {picture.size[1]}: "
                    "make them alike"
                )
            mask = _grey(mask)
            if mask.mode not in ("L", "P", "1"):
                raise InputError(
                    f"{shown(path)} is in mode {mask.mode}: save masks as grey levels that number the classes"
                )
            side = min(mask.size)
            left, top = (width - side) / 2, (height - side) / 2
            plain = Image.fromarray(np.asarray(mask).astype(np.uint8))
            square = plain.resize((size, size), Image.Resampling.NEAREST, box=(left, top, left + side, top + side))
    except InputError:
        raise
    except Exception as error:  # Pillow raises what its readers raise
        raise InputError(
            f"{shown(path)} cannot be read as a mask ({shown(str(error))[:80]}): save it as PNG"
        ) from error
    return torch.from_numpy(np.asarray(square).astype(np.int64))


def _grey(mask: Image.Image) -> Image.Image:
    """A mask that was saved in colours, all of which are greys, as these; any other as it is."""
    if mask.mode not in ("RGB", "RGBA"):
        return mask
    red, *others = mask.split()[:3]
    alike = all(np.array_equal(np.asarray(red), np.asarray(other)) for other in others)
    seen = mask.mode == "RGB" or bool((np.asarray(mask)[..., 3] == 255).all())
    return red if alike and seen else mask


def _stems(folder: Path) -> dict[str, Path]:
    """Name without ending -> file, of the pictures in a folder."""
    if not folder.is_dir():
        raise InputError(f"{shown(folder)} is missing: data.root needs the folders images and masks")
    found: dict[str, Path] = {}
    for path in _pictures(folder):
        if path.stem in found:
            raise InputError(f"{shown(path)} and {shown(found[path.stem].name)} have one name: rename one")
        found[path.stem] = _checked(folder, path)
    if not found:
        raise InputError(f"{shown(folder)} has no images ({', '.join(sorted(KINDS))}): give another folder")
    return found


def _pictures(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.iterdir() if p.suffix.lower() in KINDS and not p.name.startswith("."))


def _inside(folder: Path, cell: str) -> Path:
    """The file that a cell names. Raises InputError for one that is empty, or leads out of the folder."""
    if not cell or Path(cell).is_absolute() or ".." in Path(cell).parts or "\0" in cell:
        raise InputError(
            f"the path {shown(cell)[:80]!r} leads out of {shown(folder)}: write paths relative to the table"
        )
    return _checked(folder, folder / cell)


def _checked(folder: Path, path: Path) -> Path:
    """A file, whose links stay in the folder."""
    inside = os.path.realpath(folder)
    if not os.path.realpath(path).startswith(f"{inside}{os.sep}"):
        raise InputError(f"{shown(path)} is a link that leaves {shown(folder)}: remove it, or copy what it shows")
    return path


def _say(line: str) -> None:
    print(f"knep: {line}", file=sys.stderr)

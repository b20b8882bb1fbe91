"""Folders of images, one per class: decoded in workers or read from a cache, scaled and augmented in whole batches."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knep.config.budget import check_processes, check_room
from knep.data.base import ImageData
from knep.data.decode import BITS, MAX_PIXELS, check_headers, refusal
from knep.data.folder_loader import FolderLoader, Images
from knep.data.listing import Listing, counted, list_images, normal, splits, taken_for_classes
from knep.data.loaders import Batches
from knep.data.splits import stratified, subset
from knep.errors import InputError
from knep.utils.text import shown

_TEST_SHARE = 0.2
_EVAL_BATCH = 128
Part = tuple[Sequence[Path], Tensor]


class ImageFolder(ImageData):
    """Images in `root/<class>/`, or in `root/train/<class>/` with `root/val` and `root/test` where they exist.

    What is missing is split off the training images, by class: a fifth for the test, `val_share` for validation; a
    class with too few images for that is for training alone. bits, after `prepare`: of numbers with more than 8 bits
    a pixel, None where there are none.

    size: pixels of a side of the centre square after resizing; channels: 1 (grey) or 3; workers: processes that decode;
    cache: True keeps all images at this size in the user's cache folder, a folder's name keeps them there;
    write_cache: False uses a cache that is there, and decodes where there is none;
    max_pixels: a file with more is refused before it takes memory; follow_links: whether links may leave root.
    Raises InputError for a missing folder, an empty class, an unreadable or too large image, a link that leaves root.
    """

    def __init__(
        self,
        *,
        size: int = 64,
        channels: int = 3,
        workers: int = 2,
        cache: bool | str | Path | None = None,
        write_cache: bool = True,
        max_pixels: int = MAX_PIXELS,
        follow_links: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if size < 8:
            raise InputError(f"data.size={size} must be at least 8 pixels")
        if channels not in (1, 3):
            raise InputError(f"data.channels={channels} must be 1 or 3")
        if workers < 0:
            raise InputError(f"data.workers={workers} must not be negative")
        check_processes(1, workers)
        if not isinstance(cache, bool | str | Path | None) or cache == "":
            raise InputError(f"data.cache={cache!r} must be true, false or a folder")
        if not isinstance(max_pixels, int) or max_pixels < 1:
            raise InputError(f"data.max_pixels={max_pixels} must be a whole number of pixels, at least 1")
        for name, value in (("write_cache", write_cache), ("follow_links", follow_links)):
            if not isinstance(value, bool):
                raise InputError(f"data.{name}={value} must be true or false")
        need = self.batch_size * channels * size**2
        check_room(need, f"data.size={size} and data.batch_size={self.batch_size} need", "write smaller numbers")
        self.image_size, self.channels, self._workers = size, channels, workers
        self._max_pixels, self._follow_links = max_pixels, follow_links
        self._use_cache, self._write_cache = bool(cache), write_cache
        self._cache_folder = None if isinstance(cache, bool) or cache is None else Path(cache)
        self.bits: int | None = None
        self._kept_bits: int | None = None

    def keep(self, facts: Mapping[str, Any]) -> None:
        bits = facts.get("bits", 16)
        if bits not in BITS:
            raise InputError("the checkpoint was not written by knep: its images have no bits, give another one")
        self._kept_bits = bits

    def _read(self) -> None:
        parts = self._split()
        self._parts: dict[str, Any] = self._cached(parts) if self._use_cache else self._decoded(parts)
        self.sizes = {name: len(images) for name, images in self._parts.items()}

    def _split(self) -> dict[str, Part]:
        """Files and labels of each split; all of the source but for `limit`."""
        if self.root is None:
            raise InputError("data=image_folder needs data.root=FOLDER with a folder of images per class")
        root = Path(self.root)
        if not root.is_dir():
            raise InputError(f"data.root={shown(root)} is no folder: give one with a folder of images per class")
        folders, unused = splits(root)
        train = list_images(folders["train"], self._inside)
        self.class_names, self.num_classes = [shown(normal(name)) for name in train.classes], len(train.classes)
        listed = {"train": train} | {
            name: self._own(folders[name], train) for name in ("val", "test") if name in folders
        }
        _tell(root, listed, unused, taken_for_classes(train) if folders["train"] == root else [])
        return self._split_off({name: (part.files, part.labels) for name, part in listed.items()})

    @property
    def _inside(self) -> Path | None:
        """The folder that no link may leave."""
        return None if self._follow_links else Path(str(self.root))

    def _split_off(self, parts: dict[str, Part]) -> dict[str, Part]:
        """With the splits that are missing, by class, off the training images."""
        files, y = parts["train"]
        shares = (("test", _TEST_SHARE, 0), ("val", self.val_share, self.split_seed))
        missing = [row for row in shares if row[0] not in parts]
        few = torch.bincount(y, minlength=self.num_classes) <= len(missing)
        what = " and ".join(name for name, *_ in missing)
        if bool(few.all()):
            raise InputError(
                f"no class has more than {len(missing)} images, and one of each is split off for {what}: add images, "
                "or give folders of their own for that"
            )
        if bool(few.any()):
            names = [self.class_names[k] for k in few.nonzero().flatten().tolist()]
            _say(
                f"{len(names)} of {self.num_classes} classes have too few images to split one off for {what}, and are "
                f"for training alone: {_some(names)}"
            )
        rest, alone = (~few[y]).nonzero().flatten(), few[y].nonzero().flatten()
        for name, share, seed in missing:
            stay, off = stratified(y[rest], share, seed)
            parts[name] = _pick(files, y, rest[off])
            rest = rest[stay]
        parts["train"] = _pick(files, y, torch.cat([rest, alone]).sort().values)
        return parts

    def _own(self, folder: Path, train: Listing) -> Listing:
        """The images of a split of its own, with the labels of the training split's classes."""
        listing = list_images(folder, self._inside)
        wanted, here = ([normal(name) for name in part.classes] for part in (train, listing))
        alone = {"it": set(here) - set(wanted), "training": set(wanted) - set(here)}
        odd = [
            f"{where} alone has {_some([shown(name) for name in sorted(names)])}"
            for where, names in alone.items()
            if names
        ]
        if odd:
            raise InputError(f"{shown(folder)} and the training folder differ in their classes: {', '.join(odd)}")
        listing.labels = torch.tensor([wanted.index(name) for name in here])[listing.labels]
        return listing

    def _limited(self, parts: dict[str, Part]) -> dict[str, Part]:
        files, y = parts["train"]
        return parts | {"train": _pick(files, y, subset(y, self.limit, self.split_seed))}

    def _images(self, files: Sequence[Path], y_N: Tensor) -> Images:
        return Images(files, y_N, self.channels, self.image_size, self._max_pixels, self.bits or 16)

    def _decoded(self, parts: dict[str, Part]) -> dict[str, Images]:
        everything, parts = _files(parts), self._limited(parts)
        self._measure(everything, _files(parts))
        return {name: self._images(*part) for name, part in parts.items()}

    def _measure(self, everything: Sequence[Path], used: Sequence[Path]) -> None:
        """Checks the files in use, and finds the bits of those with more than 8: of all, whatever `limit` leaves."""
        found = check_headers(used, self._max_pixels)
        if found is not None and self._kept_bits is None and len(used) < len(everything):
            found = check_headers(everything, self._max_pixels)
        self.bits = found if found is None else self._kept_bits or found
        if self.bits not in (None, 16):
            _say(f"images of more than 8 bits hold numbers of up to {self.bits} bits: of these the upper 8 are kept")

    def _cached(self, parts: dict[str, Part]) -> dict[str, Any]:
        """Every split out of one cache of all files as they are now; where there is none, it is built, if it may be."""
        from knep.data.cache import CachedImages, build_cache, cache_path, open_cache, source_of

        files = _files(parts)
        root = Path(str(self.root))
        source = source_of(root, files, self.channels, self.image_size)
        path = cache_path(root, self._cache_folder, self.channels, self.image_size)
        cache = open_cache(path, source, self._max_pixels, self._write_cache)
        if cache is not None and cache.bits is not None and self._kept_bits not in (None, cache.bits):
            cache = None
        if cache is None and not self._write_cache:
            where = shown(path.parent)
            print(f"knep: {where} has no cache of these images: type data.cache={where} to write one", file=sys.stderr)
            self._use_cache = False
            return self._decoded(parts)
        if cache is None:
            self._measure(files, files)
            images = self._images(files, torch.zeros(len(files), dtype=torch.long))
            loader = FolderLoader(images, Batches(len(files), _EVAL_BATCH), self._workers)
            cache = build_cache(path, replace(source, bits=self.bits or 0), loader.to_the_end(), self._max_pixels)
        self.bits = cache.bits
        row = {path: k for k, path in enumerate(files)}
        return {
            name: CachedImages(cache, torch.tensor([row[path] for path in part_files]), y)
            for name, (part_files, y) in self._limited(parts).items()
        }

    def _loader(self, split: str, batches: Batches, keep: bool = False) -> FolderLoader:
        return FolderLoader(self._parts[split], batches, 0 if self._use_cache else self._workers, keep)

    def _training_batches(self) -> Batches:
        weights = self.row_weights()
        where = self.rank_world()
        return Batches(self.sizes["train"], self.batch_size, self.seed, self.drop_last, *where, weights, self.used_rows)

    def _eval(self, split: str) -> FolderLoader:
        rank, world = self.rank_world()
        size = max(self.batch_size, _EVAL_BATCH)
        return self._loader(split, Batches(self.sizes[split], size, rank=rank, world=world))

    def train_dataloader(self) -> FolderLoader:
        self.check_sizes()
        return self._loader("train", self._training_batches(), keep=True)

    @property
    def train_batches(self) -> int:
        return len(self._training_batches())

    def val_dataloader(self) -> FolderLoader:
        return self._eval("val")

    def test_dataloader(self) -> FolderLoader:
        return self._eval("test")

    def train_images(self) -> Iterator[Tensor]:
        for x, _ in self._loader("train", Batches(self.sizes["train"], _EVAL_BATCH)):
            yield x

    def train_targets(self) -> Iterator[Tensor]:
        yield self._parts["train"].y_N

    def sample(self, count: int) -> Tensor:
        """Images (at most count, C, S, S) spread evenly over the classes' order."""
        step = max(1, self.sizes["train"] // count)
        index = np.arange(0, min(self.sizes["train"], step * count), step)
        got = self._parts["train"][index, np.ones(len(index), dtype=bool)]
        if isinstance(got, list):
            raise refusal(got, len(index))
        return got[0]


def _files(parts: Mapping[str, Part]) -> list[Path]:
    return sorted(path for part_files, _ in parts.values() for path in part_files)


def _tell(root: Path, listed: Mapping[str, Listing], unused: Sequence[str], odd: Sequence[str]) -> None:
    """What is left out of a folder, and what its names do not show, in a line each."""
    left = sum((part.left for part in listed.values()), Counter())
    total = sum(len(part.files) for part in listed.values())
    if left:
        _say(
            f"{sum(left.values())} of {total + sum(left.values())} files in {shown(root)} are left out: {counted(left)}"
        )
    deeper = sum(part.deeper for part in listed.values())
    if deeper:
        _say(f"{deeper} of {total} images lie in folders below that of their class")
    if unused:
        _say(f"left out beside the splits of {shown(root)}: {_some(list(map(shown, unused)))}")
    if odd:
        _say(f"taken for a class, as there is no folder train: {_some(list(map(shown, odd)))}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _say(line: str) -> None:
    print(f"knep: {line}", file=sys.stderr)


def _pick(files: Sequence[Path], y_N: Tensor, index: Tensor) -> Part:
    return [files[i] for i in index.tolist()], y_N[index]

"""Folders of images, one per class: decoded in workers or read from a cache, scaled and augmented in whole batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knep.budget import check_processes
from knep.data.batches import Batches, FolderLoader, Images
from knep.data.images import MAX_PIXELS, check_headers
from knep.data.module import ImageData
from knep.data.split import stratified, subset
from knep.data.tree import list_images
from knep.errors import InputError
from knep.room import check_room
from knep.text import shown

_TEST_SHARE = 0.2
_EVAL_BATCH = 128
Part = tuple[Sequence[Path], Tensor]


class ImageFolder(ImageData):
    """Images in `root/<class>/`, or in `root/train/<class>/` with `root/val` and `root/test` where they exist.

    What is missing is split off the training images, by class: a fifth for the test, `val_share` for validation.

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
        train_root = root / "train" if (root / "train").is_dir() else root
        files, y, classes = self._list(train_root)
        self.class_names, self.num_classes = [shown(name) for name in classes], len(classes)
        parts = {name: self._own(root / name, classes) for name in ("val", "test") if (root / name).is_dir()}
        rest = torch.arange(len(y))
        for name, share, seed in (("test", _TEST_SHARE, 0), ("val", self.val_share, self.split_seed)):
            if name not in parts:
                stay, off = stratified(y[rest], share, seed)
                parts[name] = _pick(files, y, rest[off])
                rest = rest[stay]
        parts["train"] = _pick(files, y, rest)
        return parts

    def _list(self, folder: Path) -> tuple[list[Path], Tensor, list[str]]:
        return list_images(folder, None if self._follow_links else Path(str(self.root)))

    def _own(self, folder: Path, wanted: list[str]) -> Part:
        files, y, classes = self._list(folder)
        if classes != wanted:
            odd = ", ".join(shown(name) for name in sorted(set(classes) ^ set(wanted))[:5])
            raise InputError(f"{shown(folder)} and the training folder differ in their classes: {odd}")
        return files, y

    def _limited(self, parts: dict[str, Part]) -> dict[str, Part]:
        files, y = parts["train"]
        return parts | {"train": _pick(files, y, subset(y, self.limit, self.split_seed))}

    def _images(self, files: Sequence[Path], y_N: Tensor) -> Images:
        return Images(files, y_N, self.channels, self.image_size, self._max_pixels)

    def _decoded(self, parts: dict[str, Part]) -> dict[str, Images]:
        parts = self._limited(parts)
        for part_files, _ in parts.values():
            check_headers(part_files, self._max_pixels)
        return {name: self._images(*part) for name, part in parts.items()}

    def _cached(self, parts: dict[str, Part]) -> dict[str, Any]:
        """Every split out of one cache of all files as they are now; where there is none, it is built, if it may be."""
        from knep.data.cache import CachedImages, build_cache, cache_path, open_cache, source_of

        files = sorted(path for part_files, _ in parts.values() for path in part_files)
        root = Path(str(self.root))
        source = source_of(root, files, self.channels, self.image_size)
        path = cache_path(root, self._cache_folder, self.channels, self.image_size)
        cache = open_cache(path, source, self._max_pixels, self._write_cache)
        if cache is None and not self._write_cache:
            where = shown(path.parent)
            print(f"knep: {where} has no cache of these images: type data.cache={where} to write one", file=sys.stderr)
            self._use_cache = False
            return self._decoded(parts)
        if cache is None:
            check_headers(files, self._max_pixels)
            images = self._images(files, torch.zeros(len(files), dtype=torch.long))
            loader = FolderLoader(images, Batches(len(files), _EVAL_BATCH), self._workers)
            cache = build_cache(path, source, loader, self._max_pixels)
        row = {path: k for k, path in enumerate(files)}
        return {
            name: CachedImages(cache, torch.tensor([row[path] for path in part_files]), y)
            for name, (part_files, y) in self._limited(parts).items()
        }

    def _loader(self, split: str, batches: Batches, keep: bool = False) -> FolderLoader:
        return FolderLoader(self._parts[split], batches, 0 if self._use_cache else self._workers, keep)

    def _training_batches(self) -> Batches:
        return Batches(self.sizes["train"], self.batch_size, self.seed, self.drop_last, *self._rank_world())

    def _eval(self, split: str) -> FolderLoader:
        rank, world = self._rank_world()
        size = max(self.batch_size, _EVAL_BATCH)
        return self._loader(split, Batches(self.sizes[split], size, rank=rank, world=world))

    def train_dataloader(self) -> FolderLoader:
        self._check()
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

    def sample(self, count: int) -> Tensor:
        """Images (at most count, C, S, S) spread evenly over the classes' order."""
        step = max(1, self.sizes["train"] // count)
        index = np.arange(0, min(self.sizes["train"], step * count), step)
        got = self._parts["train"][index, np.ones(len(index), dtype=bool)]
        if isinstance(got, str):
            raise InputError(got)
        return got[0]


def _pick(files: Sequence[Path], y_N: Tensor, index: Tensor) -> Part:
    return [files[i] for i in index.tolist()], y_N[index]

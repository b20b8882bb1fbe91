"""Folders of images, one per class: decoded in workers, scaled and augmented on whole batches like any other data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import center_crop, resize

from knep.data.loader import order_of, padded_share, training_slice
from knep.data.module import ImageData
from knep.data.split import stratified, subset
from knep.errors import InputError

_KINDS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})
_TEST_SHARE = 0.2


def list_images(folder: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Files, labels (N,) and class names of a folder of class folders, in alphabetical order.

    Raises InputError for no classes, or a class folder without images.
    """
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise InputError(f"data.root={folder} has {len(classes)} class folders: give it one folder per class")
    files, labels = [], []
    for k, name in enumerate(classes):
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in _KINDS and p.is_file())
        if not found:
            raise InputError(f"{folder / name} is a class folder without images: add some ({', '.join(sorted(_KINDS))})"
                             " or remove it")  # fmt: skip
        files += found
        labels += [k] * len(found)
    return files, torch.tensor(labels), classes


def read_image(path: Path, channels: int, size: int) -> Tensor:
    """uint8 (channels, size, size): the short side resized, the centre cropped. Raises InputError naming the file."""
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        image = decode_image(str(path), mode=mode)
    except (RuntimeError, ValueError) as error:
        what = "cannot be read as an image" if path.is_file() else "is missing"
        raise InputError(f"{path} {what}: repair or remove it") from error
    return center_crop(resize(image, [size], antialias=True), [size, size])


class _Images(Dataset):
    """Whole batches by index; a label of -1 marks padding."""

    def __init__(self, files: Sequence[Path], y_N: Tensor, channels: int, size: int) -> None:
        self.files, self.y_N, self._channels, self._size = list(files), y_N, channels, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, counts = item
        label = self.y_N[index] if counts else torch.tensor(-1)
        return read_image(self.files[index], self._channels, self._size), label


class _Batches(Sampler):
    """The batches of one rank: shuffled by (seed, epoch) for training, in order and padded for evaluation."""

    def __init__(self, images: int, size: int, seed: int | None, drop_last: bool, rank: int, world: int) -> None:
        self._images, self._size, self._seed = images, size, seed
        self._drop_last, self._rank, self._world = drop_last, rank, world
        self._epoch = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self._images, self._size)
        if self._seed is None:
            return whole + (rest > 0)
        return whole + (not self._drop_last and rest >= self._world)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        if self._seed is None:
            for batch in range(len(self)):
                index, counts = padded_share(self._images, batch, self._size, self._rank, self._world)
                yield list(zip(index.tolist(), counts.tolist(), strict=True))
            return
        order = order_of(self._images, self._seed, self._epoch)
        for batch in range(len(self)):
            share = training_slice(batch, self._size, self._images, self._rank, self._world)
            yield [(i, True) for i in order[share].tolist()]


class ImageFolder(ImageData):
    """Images in `root/<class>/`, or in `root/train/<class>/` with `root/val` and `root/test` where they exist.

    What is missing is split off the training images, by class: a fifth for the test, `val_share` for validation.

    size: pixels of a side after resizing the short side and cropping the centre; channels: 1 (grey) or 3;
    workers: processes that decode. Raises InputError for a missing folder, an empty class or an unreadable image.
    """

    def __init__(self, *, size: int = 64, channels: int = 3, workers: int = 2, **common: Any) -> None:
        super().__init__(**common)
        if size < 8:
            raise InputError(f"data.size={size} must be at least 8 pixels")
        if channels not in (1, 3):
            raise InputError(f"data.channels={channels} must be 1 or 3")
        if workers < 0:
            raise InputError(f"data.workers={workers} must not be negative")
        self.image_size, self.channels, self._workers = size, channels, workers

    def _read(self) -> None:
        if self.root is None:
            raise InputError("data=image_folder needs data.root=FOLDER with a folder of images per class")
        root = Path(self.root)
        if not root.is_dir():
            raise InputError(f"data.root={root} is no folder: give one with a folder of images per class")
        train_root = root / "train" if (root / "train").is_dir() else root
        files, y, self.class_names = list_images(train_root)
        self.num_classes = len(self.class_names)
        parts = {name: self._own(root / name) for name in ("val", "test") if (root / name).is_dir()}
        rest = torch.arange(len(y))
        for name, share, seed in (("test", _TEST_SHARE, 0), ("val", self.val_share, self.split_seed)):
            if name not in parts:
                stay, off = stratified(y[rest], share, seed)
                parts[name] = _pick(files, y, rest[off])
                rest = rest[stay]
        parts["train"] = _pick(files, y, rest[subset(y[rest], self.limit, self.split_seed)])
        for part_files, _ in parts.values():
            _check_readable(part_files)
        self._parts = {n: _Images(*part, self.channels, self.image_size) for n, part in parts.items()}
        self.sizes = {name: len(images) for name, images in self._parts.items()}

    def _own(self, folder: Path) -> tuple[list[Path], Tensor]:
        files, y, classes = list_images(folder)
        if classes != self.class_names:
            odd = sorted(set(classes) ^ set(self.class_names))
            raise InputError(f"{folder} and the training folder differ in their classes: {', '.join(odd[:5])}")
        return files, y

    def _loader(self, split: str, training: bool) -> DataLoader:
        rank, world = self._rank_world()
        images = self._parts[split]
        size = self.batch_size if training else max(self.batch_size, 128)
        seed = self.seed if training else None
        batches = _Batches(len(images), size, seed, self.drop_last, rank, world)
        loader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=training and self._workers > 0,
        )
        if training:
            taken = min(len(images), len(batches) * size)
            loader.mean_batch = taken / world / len(batches)  # type: ignore[attr-defined]
        return loader

    def train_dataloader(self) -> DataLoader:
        self._check()
        return self._loader("train", training=True)

    @property
    def train_batches(self) -> int:
        rank, world = self._rank_world()
        return len(_Batches(self.sizes["train"], self.batch_size, self.seed, self.drop_last, rank, world))

    def val_dataloader(self) -> DataLoader:
        return self._loader("val", training=False)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", training=False)

    def train_images(self) -> Iterator[Tensor]:
        batches = _Batches(self.sizes["train"], 128, None, False, 0, 1)
        loader = DataLoader(self._parts["train"], batch_sampler=batches, num_workers=self._workers)
        for x, y in loader:
            yield x[y >= 0]

    def sample(self, count: int) -> Tensor:
        """Images spread evenly over the classes' order."""
        images = self._parts["train"]
        step = max(1, len(images) // count)
        return torch.stack([images[i, True][0] for i in range(0, min(len(images), step * count), step)])


def _pick(files: Sequence[Path], y_N: Tensor, index: Tensor) -> tuple[list[Path], Tensor]:
    return [files[i] for i in index.tolist()], y_N[index]


def _check_readable(files: Sequence[Path]) -> None:
    """Opens every header, which is cheap, so that a bad file is named before hours of training. Raises InputError."""
    from PIL import Image

    for path in files:
        try:
            with warnings.catch_warnings(), Image.open(path) as image:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image.verify()
        except Exception as error:  # PIL raises what its many plugins raise
            raise InputError(f"{path} cannot be read as an image: repair or remove it") from error

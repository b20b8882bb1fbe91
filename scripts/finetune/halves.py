"""One half of Fashion-MNIST's classes, a few images of each for training."""

from __future__ import annotations

import functools

import torch

from knep.data.base import Arrays
from knep.data.mnist import FashionMnist
from knep.errors import InputError

_CLASSES = {"low": range(5), "high": range(5, 10)}
_VALIDATION = 200  # images of each class


@functools.lru_cache
def _whole(root: str | None) -> Arrays:
    """All of Fashion-MNIST, unpacked once."""
    return FashionMnist(root=root)._arrays()


class HalfFashion(FashionMnist):
    """Five classes of Fashion-MNIST; the last 200 training images of each are for validation, at any split_seed.

    classes: "low", 0 to 4, or "high", 5 to 9; images: for training, equally many of each class, drawn by split_seed,
    None for all. The test split has all 1,000 images of each class.
    """

    def __init__(
        self,
        *,
        classes: str = "low",
        images: int | None = None,
        root: str | None = None,
        batch_size: int = 50,
        split_seed: int = 0,
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(root=root, batch_size=batch_size, split_seed=split_seed, seed=seed, num_classes=num_classes)
        if classes not in _CLASSES:
            raise InputError(f"data.classes={classes} must be low or high")
        self.half, self.images = _CLASSES[classes], images

    def _arrays(self) -> Arrays:
        whole = _whole(self.root)
        g = torch.Generator().manual_seed(self.split_seed)
        train, val = [], []
        for k in self.half:
            rows = torch.nonzero(whole.train_y == k).flatten()
            rows, held = rows[:-_VALIDATION], rows[-_VALIDATION:]
            count = len(rows) if self.images is None else self.images // len(self.half)
            train.append(rows[torch.randperm(len(rows), generator=g)[:count]])
            val.append(held)
        test = torch.nonzero((whole.test_y >= self.half[0]) & (whole.test_y <= self.half[-1])).flatten()
        first, rows, held = self.half[0], torch.cat(train), torch.cat(val)
        return Arrays(
            whole.train_x[rows],
            whole.train_y[rows] - first,
            whole.test_x[test],
            whole.test_y[test] - first,
            whole.class_names[first : first + len(self.half)],
            val_x=whole.train_x[held],
            val_y=whole.train_y[held] - first,
        )

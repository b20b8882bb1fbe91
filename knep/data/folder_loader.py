"""Whole batches of an image folder by index: decoded by whom."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from knep.data.decode import Bad, BadImage, read_images, refusal, unreadable
from knep.data.loaders import Batch, Batches, Loader, labels
from knep.utils.orphans import ends_with_parent


class Images(Dataset):
    """Decodes whole batches: x uint8 (n, C, S, S), y int64 (n,), where -1 marks padding; or its files that are bad.

    They are returned, not raised, because a worker process would wrap an error in its own traceback.
    """

    def __init__(
        self, files: Sequence[Path], y_N: Tensor, channels: int, size: int, max_pixels: int, bits: int = 16
    ) -> None:
        self.files, self.y_N = list(files), y_N
        self._how = (channels, size, max_pixels, bits)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor] | list[Bad]:
        files = [self.files[i] for i in batch[0]]
        try:
            x = read_images(files, *self._how)
        except BadImage as error:
            return unreadable(dict.fromkeys(files), *self._how) or [error.bad]
        return x, labels(self.y_N, batch)


def _as_is(got: object) -> Any:
    return got


def _worker(parent: int, number: int) -> None:
    ends_with_parent(parent)


class FolderLoader(Loader):
    """Batches (x uint8 (n, C, S, S), y int64 (n,)) of `images`.

    images: `Images`, or anything whose items by `Batch` are the same; workers: processes that decode, kept between
    epochs if `keep`. Raises InputError where an image cannot be read.
    """

    def __init__(self, images: Images, batches: Batches, workers: int = 0, keep: bool = False) -> None:
        super().__init__(batches)
        self._images = images
        self._pin = torch.cuda.is_available()
        self._workers = self._processes(workers, keep) if workers else None

    def _processes(self, workers: int, keep: bool) -> DataLoader:
        # A generator of its own: the loader draws a seed for its workers, which must not shift the run's numbers.
        return DataLoader(
            self._images,
            sampler=self.batch_sampler,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            pin_memory=self._pin,
            persistent_workers=keep,
            generator=torch.Generator(),
        )

    def _items(self) -> Iterable[tuple[Tensor, Tensor] | list[Bad]]:
        if self._workers is not None:
            self._workers.worker_init_fn = partial(_worker, os.getpid())
            yield from self._workers
            return
        for batch in self.batch_sampler:
            got = self._images[batch]
            yield got if isinstance(got, list) or not self._pin else (got[0].pin_memory(), got[1].pin_memory())

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        for got in self._items():
            if isinstance(got, list):
                raise refusal(got, len(self._images))
            yield got

    def to_the_end(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass that goes on behind what cannot be read, and raises InputError for all of it at its end."""
        bad: list[Bad] = []
        for got in self._items():
            if isinstance(got, list):
                bad += got
            elif not bad:
                yield got
        if bad:
            raise refusal(bad, len(self._images))

"""Whole batches of an image folder by index: which images, in what order, decoded by whom."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from knep.data.decode import Bad, BadImage, read_images, refusal, unreadable
from knep.data.loaders import order_of, padded_share, training_slice
from knep.utils.orphans import ends_with_parent

# Which images (n,), and which of them count (n,): arrays, because tensors travel to a worker by file descriptor.
Batch = tuple[np.ndarray, np.ndarray]


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


def labels(y_N: Tensor, batch: Batch) -> Tensor:
    """int64 (n,): the labels of a batch, -1 for what does not count."""
    index, counts = batch
    return y_N[torch.from_numpy(index)].where(torch.from_numpy(counts), -1)


class Batches(Sampler[Batch]):
    """The batches of one rank: shuffled by (seed, epoch) for training, in order and padded for evaluation (seed None).

    size: global; start: the batch that the next iteration begins with, once.
    """

    def __init__(
        self, images: int, size: int, seed: int | None = None, drop_last: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self._images, self._size, self._seed = images, size, seed
        self._drop_last, self._rank, self._world = drop_last, rank, world
        self._epoch = 0
        self.start = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self._images, self._size)
        if self._seed is None:
            return whole + (rest > 0)
        return whole + (not self._drop_last and rest >= self._world)

    @property
    def mean_size(self) -> float:
        """Images per batch and rank, averaged over the epoch."""
        return min(self._images, len(self) * self._size) / self._world / len(self)

    def __iter__(self) -> Iterator[Batch]:
        first, self.start = self.start, 0
        if self._seed is None:
            for batch in range(first, len(self)):
                index, counts = padded_share(self._images, batch, self._size, self._rank, self._world)
                yield index.numpy(), counts.numpy()
            return
        order = order_of(self._images, self._seed, self._epoch).numpy()
        for batch in range(first, len(self)):
            index = order[training_slice(batch, self._size, self._images, self._rank, self._world)]
            yield index, np.ones(len(index), dtype=bool)


def _as_is(got: Any) -> Any:
    return got


def _worker(parent: int, number: int) -> None:
    ends_with_parent(parent)


class FolderLoader:
    """Batches (x uint8 (n, C, S, S), y int64 (n,)) of `images`; resumes inside an epoch by `state_dict`.

    images: `Images`, or anything whose items by `Batch` are the same; workers: processes that decode, kept between
    epochs if `keep`. Raises InputError where an image cannot be read.
    """

    def __init__(self, images: Any, batches: Batches, workers: int = 0, keep: bool = False) -> None:
        self.batch_sampler = batches
        self._images = images
        self._start = self._position = 0  # the batch that an iteration begins with, once; the next one
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

    def __len__(self) -> int:
        return len(self.batch_sampler)

    @property
    def mean_batch(self) -> float:
        """Images per batch and rank, averaged over the epoch."""
        return self.batch_sampler.mean_size

    def _read(self) -> Iterable[tuple[Tensor, Tensor] | list[Bad]]:
        if self._workers is not None:
            self._workers.worker_init_fn = partial(_worker, os.getpid())
            yield from self._workers
            return
        for batch in self.batch_sampler:
            got = self._images[batch]
            yield tuple(t.pin_memory() for t in got) if self._pin and not isinstance(got, list) else got

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self._start = self._start, 0
        self.batch_sampler.start = first
        for batch, got in enumerate(self._read(), first):
            if isinstance(got, list):
                raise refusal(got, len(self._images))
            self._position = (batch + 1) % len(self)
            yield got

    def to_the_end(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass that goes on behind what cannot be read, and raises InputError for all of it at its end."""
        bad: list[Bad] = []
        for got in self._read():
            if isinstance(got, list):
                bad += got
            elif not bad:
                yield got
        if bad:
            raise refusal(bad, len(self._images))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = self._position = state_dict["position"]

"""Whole batches by index: which images, in what order, and the fast path for those that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from knep.utils.rng import generator

# Which images (n,), and which of them count (n,): arrays, because tensors travel to a worker by file descriptor.
Batch = tuple[np.ndarray, np.ndarray]


def order_of(rows: int, seed: int, epoch: int, weights: Tensor | None = None) -> Tensor:
    """The order (rows,) of an epoch: a function of (seed, epoch) alone, so that no state has to be kept.

    weights: (rows,), in proportion to which as many rows are drawn with replacement; None takes each once.
    """
    draw = generator(seed, epoch, 1)
    if weights is None:
        return torch.randperm(rows, generator=draw)
    ends = weights.double().cumsum(0)  # torch.multinomial takes no more than 2**24 rows
    at = torch.rand(rows, dtype=torch.float64, generator=draw) * ends[-1]
    return torch.searchsorted(ends, at, right=True).clamp_(max=rows - 1)


def training_slice(batch: int, size: int, images: int, rank: int, world: int) -> slice:
    """Where rank's share of global batch number `batch` lies in the epoch's order; a short last batch is shared too."""
    start = batch * size
    width = min(size, images - start) // world
    return slice(start + rank * width, start + (rank + 1) * width)


def padded_share(images: int, batch: int, size: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Indices of rank's share of an evaluation batch, and which of them count.

    All ranks get shares of the same width, so that none waits for a batch that another never has; what fills up the
    last ones repeats an image and does not count.
    """
    start, stop = batch * size, min((batch + 1) * size, images)
    width = -(-(stop - start) // world)
    index = torch.arange(start + rank * width, start + (rank + 1) * width)
    return index.clamp(max=stop - 1), index < stop


class Batches(Sampler[Batch]):
    """The batches of one rank: shuffled by (seed, epoch) for training, in order and padded for evaluation (seed None).

    size: global; weights: of the rows, as for `order_of`; start: the batch that the next iteration begins with, once.
    used: how many rows of an epoch's order are taken, None for all.
    """

    def __init__(
        self,
        images: int,
        size: int,
        seed: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        weights: Tensor | None = None,
        used: int | None = None,
    ) -> None:
        self._used = images if used is None else used
        self._images, self._size, self._seed, self._weights = images, size, seed, weights
        self._drop_last, self._rank, self._world = drop_last, rank, world
        self._epoch = 0
        self.start = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self._used, self._size)
        if self._seed is None:
            return whole + (rest > 0)
        return whole + (not self._drop_last and rest >= self._world)

    @property
    def mean_size(self) -> float:
        """Images per batch and rank, averaged over the epoch."""
        return min(self._used, len(self) * self._size) / self._world / len(self)

    def shares(self, device: torch.device | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What `__iter__` gives as tensors on a device, None where all count: an epoch's order goes there at once."""
        first, self.start = self.start, 0
        order = (
            None if self._seed is None else order_of(self._images, self._seed, self._epoch, self._weights).to(device)
        )
        for batch in range(first, len(self)):
            if order is None:
                index, counts = padded_share(self._images, batch, self._size, self._rank, self._world)
                yield index.to(device), counts.to(device)
            else:
                yield order[training_slice(batch, self._size, self._images, self._rank, self._world)], None

    def __iter__(self) -> Iterator[Batch]:
        for index, counts in self.shares():
            yield index.numpy(), np.ones(len(index), dtype=bool) if counts is None else counts.numpy()


def labels(y_N: Tensor, batch: Batch) -> Tensor:
    """int64 (n,): the labels of a batch, -1 for what does not count."""
    index, counts = batch
    return y_N[torch.from_numpy(index)].where(torch.from_numpy(counts), -1)


class Loader:
    """Batches (x, y) of a sampler's indices; resumes inside an epoch by `state_dict`."""

    def __init__(self, batches: Batches) -> None:
        self.batch_sampler = batches
        self._start = self._position = 0  # the batch that an iteration begins with, once; the next one

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    @property
    def mean_batch(self) -> float:
        """Images per batch and rank, averaged over the epoch."""
        return self.batch_sampler.mean_size

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from the one that the sampler starts with."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self._start = self._start, 0
        self.batch_sampler.start = first
        for batch, got in enumerate(self._read(), first):
            self._position = (batch + 1) % len(self)
            yield got

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = self._position = state_dict["position"]


class MemoryLoader(Loader):
    """Of rows x (N, ...) and targets y (N, ...), such as images and labels, that lie on the device of the training.

    In an evaluation, targets of `padding_of` mark what fills up a batch, which metrics leave out.
    """

    on_device = True  # batches need no transfer

    def __init__(self, x_NCHW: Tensor, y_N: Tensor, batches: Batches) -> None:
        super().__init__(batches)
        self._x, self._y = x_NCHW, y_N

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, counts in self.batch_sampler.shares(self._x.device):
            y = self._y.index_select(0, index)
            if counts is not None:
                y = y.where(counts.view(-1, *[1] * (y.ndim - 1)), padding_of(y))
            yield self._x.index_select(0, index), y


def padding_of(y: Tensor) -> float | int:
    """What no target is: not a number, or -1, or 255 of uint8."""
    return math.nan if y.is_floating_point() else 255 if y.dtype == torch.uint8 else -1

"""Whole batches by index: the fast path for images that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from knep.utils.rng import generator


def order_of(images: int, seed: int, epoch: int) -> Tensor:
    """The order (images,) of an epoch: a function of (seed, epoch) alone, so that no state has to be kept."""
    return torch.randperm(images, generator=generator(seed, epoch, 1))


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


class TrainLoader:
    """Shuffled training batches (x uint8 (n, C, H, W), y int64 (n,)), each rank's share of a global batch.

    batch_size: global; drop_last leaves out a last batch that is not full. Resumes inside an epoch by `state_dict`.
    """

    batch_sampler = None
    on_device = True  # batches need no transfer

    def __init__(
        self,
        x_NCHW: Tensor,
        y_N: Tensor,
        batch_size: int,
        *,
        seed: int,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._x, self._y, self._size, self._seed = x_NCHW, y_N, batch_size, seed
        self._drop_last, self._rank, self._world = drop_last, rank, world
        self._epoch = 0
        self._start = self._position = 0  # the batch that an iteration begins with, once; the next one
        self.sampler = self  # Lightning tells the sampler which epoch begins

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self._x), self._size)
        # A rest that does not give every process an image is left out too.
        return whole + (not self._drop_last and rest >= self._world)

    @property
    def mean_batch(self) -> float:
        """Images per batch and rank, averaged over the epoch."""
        taken = min(len(self._x), len(self) * self._size)
        return taken / self._world / len(self)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = order_of(len(self._x), self._seed, self._epoch).to(self._x.device)
        first, self._start = self._start, 0
        for batch in range(first, len(self)):
            index = order[training_slice(batch, self._size, len(self._x), self._rank, self._world)]
            self._position = (batch + 1) % len(self)
            yield self._x.index_select(0, index), self._y.index_select(0, index)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = self._position = state_dict["position"]


class EvalLoader:
    """Every image once, in order; labels of -1 mark padding, which metrics leave out."""

    def __init__(self, x_NCHW: Tensor, y_N: Tensor, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self._x, self._y, self._size, self._rank, self._world = x_NCHW, y_N, batch_size, rank, world

    def __len__(self) -> int:
        return -(-len(self._x) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in range(len(self)):
            index, counts = padded_share(len(self._x), batch, self._size, self._rank, self._world)
            index, counts = index.to(self._x.device), counts.to(self._x.device)
            yield self._x.index_select(0, index), self._y.index_select(0, index).where(counts, -1)

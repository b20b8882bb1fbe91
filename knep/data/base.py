"""The data modules: what every data set has in common, and the one for rows that fit in memory.

A data set of your own is a subclass of `InMemory` with one method, `_arrays`, which reads rows of any shape:

    class Table(InMemory):
        def _arrays(self) -> Arrays:
            return Arrays(train_x, train_y, test_x, test_y, ["price"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor

from knep.config.schema import Described
from knep.data.loaders import Batches, MemoryLoader
from knep.data.splits import at_random, stratified, subset
from knep.errors import InputError
from knep.tasks.base import Batch

_STATISTICS_BATCH = 1024


@dataclass(frozen=True)
class Arrays:
    """A data set as read; `kind_of` tells its kind by dtype and shape of the targets.

    x: (N, ...) of any dtype: images uint8 (N, C, S, S), vectors float32 (N, F), tokens int64 (N, L), ...
    y: classes int64 (N,) from 0; numbers float (N,) or (N, T); labels, of which several may hold, bool or uint8 (N, K)
    of 0 and 1; masks int64 (N, H, W); tokens or their tags int64 (N, L). Of masks and tokens negative values are left
    out of loss and metrics, and 255 of masks.
    class_names: of the K classes, labels, tags or tokens, or of the T numbers.
    vocabulary: of tokens x, how many there are; None where x and y are of the same tokens.
    val_x, val_y: a validation split that the data set knows itself; None lets `val_share` of the training rows be it,
    and `limit` take some of the others.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    class_names: Sequence[str]
    vocabulary: int | None = None
    val_x: Tensor | None = None
    val_y: Tensor | None = None


KINDS = {"class": "classes", "number": "numbers", "label": "labels", "mask": "masks", "token": "tokens"}
_IGNORED = 255  # of a mask


def kind_of(y: Tensor) -> str:
    """What targets are, a key of `KINDS`. Raises InputError for a dtype and shape that no task has."""
    if y.is_floating_point() and y.ndim in (1, 2):
        return "number"
    if y.dtype in (torch.bool, torch.uint8) and y.ndim == 2:
        return "label"
    kinds = {1: "class", 2: "token", 3: "mask"}
    if y.dtype == torch.int64 and y.ndim in kinds:
        return kinds[y.ndim]
    raise InputError(
        f"targets of {y.dtype} {tuple(y.shape)} are of no kind: give int64 (N,) for classes, float32 (N,) or (N, T) "
        "for numbers, bool (N, K) for labels, int64 (N, H, W) for masks or int64 (N, L) for tokens"
    )


def refuse_loaders(data: object) -> None:
    """Raises InputError for what has no images to prepare: a run reads them, where Lightning asks for loaders."""
    if not callable(getattr(data, "prepare", None)):
        kind = "a LightningDataModule" if isinstance(data, L.LightningDataModule) else "no data module"
        raise InputError(
            f"data._target_: {type(data).__name__} is {kind}, and a run needs a subclass of "
            "knep.data.base.ImageData: write one, or use "
            "your own loaders with knep.LitModule(model, knep.load(...), task)"
        )


class Loader(Protocol):
    """Batches of one split; an iteration is an epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Images(Described, Protocol):
    """Prepared rows in splits, as training and examination read them: an `ImageData`, or a stranger's loaders."""

    sizes: dict[str, int]
    seed: int

    @property
    def train_batches(self) -> int: ...

    def train_images(self) -> Iterable[Tensor]: ...

    def train_targets(self) -> Iterable[Tensor]: ...

    def sample(self, count: int) -> Tensor: ...

    def train_dataloader(self) -> Loader: ...

    def val_dataloader(self) -> Loader: ...


class ImageData(L.LightningDataModule):
    """Rows with targets in three splits; `prepare` must be called before anything else is read.

    After `prepare`: num_classes, channels, image_size (pixels of a side), class_names, sizes {"train", "val", "test"};
    of rows that are no images with a class each, target, shape and dtype too, as `knep.config.schema.DataSpec` says.

    batch_size: global, split over the processes; val_share: of the training data, by class, in (0, 1); split_seed: of
    the validation split; seed: of the order of batches; limit: use only so many training images, by class;
    num_classes: refuses data with another number; micro: rows of a batch that pass through the model at once, None for
    all of them, "auto" for as many as there is memory for.
    """

    num_classes: int
    channels: int
    image_size: int
    class_names: list[str]
    sizes: dict[str, int]
    target = "class"
    shape: tuple[int, ...] | None = None  # of a row's input; None: (channels, image_size, image_size)
    dtype = "uint8"
    sampling: Callable[[Tensor], Tensor | None] | None = None  # of the slot `sampling`: targets to weights of rows
    only_reads = False  # where a file says where the data lie, which may be a stranger's

    def __init__(
        self,
        *,
        root: str | None = None,
        batch_size: int = 64,
        val_share: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        limit: int | None = None,
        num_classes: int | None = None,
        micro: int | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("limit", limit), ("num_classes", num_classes)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"data.{name}={value} must be a whole number, at least 1")
        if not 0 < val_share < 1:
            raise InputError(f"data.val_share={val_share} must be in (0, 1)")
        if isinstance(root, str) and root.startswith("~"):
            root = str(Path(root).expanduser())
        self.root, self.batch_size, self.val_share, self.split_seed = root, batch_size, val_share, split_seed
        self.seed, self.limit, self.drop_last = seed, limit, True
        if micro not in (None, "auto") and (not isinstance(micro, int) or isinstance(micro, bool) or micro < 1):
            raise InputError(f"data.micro={micro} must be auto, or a whole number of rows that divides data.batch_size")
        self.micro, self.whole_batch = micro, batch_size
        self._wanted_classes = num_classes
        self._prepared = False

    @property
    def downloader(self) -> Callable[[Path], object] | None:
        """What fetches the data set into a folder; None where it may not, or where nothing does."""
        return None if self.only_reads else getattr(self, "_download", None)

    def prepare(self) -> None:
        """Reads and splits the data, once. Raises InputError for whatever is missing or damaged."""
        if not self._prepared:
            self._read()
            self.check_sizes()
            self._prepared = True

    def keep(self, facts: Mapping[str, Any]) -> None:
        """Before `prepare`: reads images as the run did whose checkpoint tells these facts, of `knep.engine.build`."""

    def setup(self, stage: str) -> None:
        self.prepare()

    def _read(self) -> None:
        raise NotImplementedError

    def check_sizes(self) -> None:
        """Raises InputError for a batch or a number of classes that the data does not have."""
        if self._wanted_classes is not None and self._wanted_classes != self.num_classes:
            raise InputError(
                f"data.num_classes={self._wanted_classes} but the data has {self.num_classes} classes: "
                f"write data.num_classes={self.num_classes} or null"
            )
        if self.batch_size > self.sizes["train"]:
            raise InputError(
                f"data.batch_size={self.batch_size} is larger than the training split of {self.sizes['train']} "
                f"{'images' if self.shape is None else 'rows'}: write data.batch_size={self.sizes['train']} or less"
            )
        _, world = self.rank_world()
        if self.batch_size % world:
            raise InputError(f"data.batch_size={self.batch_size} must be a multiple of the {world} processes")

    def rank_world(self) -> tuple[int, int]:
        """This process among how many; (0, 1) outside of a fit."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def row_weights(self) -> Tensor | None:
        """In proportion to what an epoch draws its rows, (N,); None where it takes each once."""
        if self.sampling is None:
            return None
        return self.sampling(torch.cat([y.cpu() for y in self.train_targets()]))

    def split_batches(self, micro: int) -> int:
        """Has the training loader give each batch in parts of `micro` rows, in the same order; returns how many parts.

        The rows that are left over behind the last whole batch stay left over. Raises InputError unless it divides.
        """
        if self.whole_batch % micro:
            raise InputError(
                f"data.micro={micro} does not divide data.batch_size={self.whole_batch}: write data.micro="
                f"{max(k for k in range(1, min(micro, self.whole_batch) + 1) if self.whole_batch % k == 0)}"
            )
        self.batch_size = micro
        return self.whole_batch // micro

    @property
    def used_rows(self) -> int | None:
        """Of an epoch's order those in whole batches, where these are given in parts; else None."""
        rows = self.sizes["train"]
        return None if self.batch_size == self.whole_batch else rows - rows % self.whole_batch

    @property
    def train_batches(self) -> int:
        """Training batches of an epoch."""
        return len(self.train_dataloader())

    def train_dataloader(self) -> Loader:
        raise NotImplementedError

    def train_images(self) -> Iterator[Tensor]:
        """The training split's images in batches, as they are: for statistics."""
        raise NotImplementedError

    def train_targets(self) -> Iterator[Tensor]:
        """The training split's targets in batches: for their mean, or how often each class is there."""
        raise InputError(f"{type(self).__name__} does not tell its targets apart: write a method train_targets")

    def sample(self, count: int) -> Tensor:
        """The first training images (count, C, H, W), uint8, or other rows: for tricks that look at the data."""
        raise NotImplementedError


class InMemory(ImageData):
    """A data set whose rows lie on the training device; subclasses say how they are read, in `_arrays`."""

    def _arrays(self) -> Arrays:
        raise NotImplementedError

    def _read(self) -> None:
        data = self._arrays()
        self.class_names = list(data.class_names)
        self.num_classes = len(self.class_names)
        self.target = kind_of(data.train_y)
        parts = [("training", data.train_x, data.train_y), ("test", data.test_x, data.test_y)]
        if data.val_x is not None and data.val_y is not None:
            parts.append(("validation", data.val_x, data.val_y))
        for part, x, y in parts:
            if not len(y):
                raise InputError(f"the {part} data has no images")
            if len(x) != len(y) or kind_of(y) != self.target or x.shape[1:] != data.train_x.shape[1:]:
                raise InputError(
                    f"the {part} data has inputs {tuple(x.shape)} and targets {y.dtype} {tuple(y.shape)}, of other "
                    "rows: give as many targets as inputs, and all of one kind"
                )
            self._check_targets(part, y)
        self._describe(data)
        train, val = self._validation_split(data)
        self._splits = {"train": train, "val": val, "test": (data.test_x, _bytes(data.test_y))}
        self.sizes = {name: len(y) for name, (_, y) in self._splits.items()}

    def _validation_split(self, data: Arrays) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(x, y) for training and for validation."""
        x, y = data.train_x, _bytes(data.train_y)
        if data.val_x is not None and data.val_y is not None:
            return (x, y), (data.val_x, _bytes(data.val_y))
        if self.target == "class":
            stay, off = stratified(y, self.val_share, self.split_seed)
            stay = stay[subset(y[stay], self.limit, self.split_seed)]
        else:
            stay, off = at_random(len(y), self.val_share, self.split_seed, self.limit)
        return (x[stay], y[stay]), (x[off], y[off])

    def _check_targets(self, part: str, y: Tensor) -> None:
        if self.target == "number":
            width = 1 if y.ndim == 1 else y.shape[1]
            if not y.isfinite().all():
                odd = int((~y.reshape(len(y), -1).isfinite()).any(1).sum())
                raise InputError(
                    f"the {part} data has {odd:,} of {len(y):,} rows with a target that is not finite: leave them out"
                )
            if width != self.num_classes:
                raise InputError(f"the {part} data has {width} numbers a row and {self.num_classes} names: name each")
        elif self.target == "label":
            if y.shape[1] != self.num_classes or int(y.max()) > 1:
                raise InputError(
                    f"the {part} data has labels {tuple(y.shape)} of 0..{int(y.max())}: give one column of 0 and 1 for "
                    f"each of the {self.num_classes} names"
                )
        else:
            # Of a class nothing may be left out, of masks and tokens what is negative.
            wrong = (y >= self.num_classes) & ((y != _IGNORED) if self.target == "mask" else (y == y))
            if self.target == "class":
                wrong |= y < 0
            if wrong.any():
                raise InputError(f"the {part} data has a label {int(y[wrong][0])} out of range: labels go from 0 to "
                                 f"{self.num_classes - 1}")  # fmt: skip

    def _describe(self, data: Arrays) -> None:
        x = data.train_x
        self.dtype = str(x.dtype).removeprefix("torch.")
        row = tuple(x.shape[1:])
        if len(row) == 3 and row[1] == row[2]:
            self.channels, self.image_size = row[0], row[1]
            return
        self.shape = row
        words = not x.is_floating_point() and x.dtype != torch.uint8 and len(row) == 1
        if words:
            known = data.vocabulary or (self.num_classes if self.target == "token" else int(x.max()) + 1)
            if int(x.min()) < 0 or max(int(x.max()), int(data.test_x.max())) >= known:
                raise InputError(f"the data has a token out of range: tokens go from 0 to {known - 1}")
            self.channels, self.image_size = known, row[0]
        else:
            self.channels, self.image_size = row[0] if row else 1, row[-1] if len(row) > 1 else 1

    def _on_device(self, split: str) -> tuple[Tensor, Tensor]:
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        x, y = self._splits[split]
        if x.device != device:
            self._splits[split] = (x.to(device), y.to(device))
        return self._splits[split]

    def train_dataloader(self) -> MemoryLoader:
        self.check_sizes()
        batches = Batches(
            self.sizes["train"],
            self.batch_size,
            self.seed,
            self.drop_last,
            *self.rank_world(),
            self.row_weights(),
            self.used_rows,
        )
        return MemoryLoader(*self._on_device("train"), batches)

    def _eval(self, split: str) -> MemoryLoader:
        rank, world = self.rank_world()
        batches = Batches(self.sizes[split], max(self.batch_size, 500), rank=rank, world=world)
        return MemoryLoader(*self._on_device(split), batches)

    def val_dataloader(self) -> MemoryLoader:
        return self._eval("val")

    def test_dataloader(self) -> MemoryLoader:
        return self._eval("test")

    def train_images(self) -> Iterator[Tensor]:
        yield from self._splits["train"][0].split(_STATISTICS_BATCH)

    def train_targets(self) -> Iterator[Tensor]:
        yield from self._splits["train"][1].split(_STATISTICS_BATCH)

    def sample(self, count: int) -> Tensor:
        return self._splits["train"][0][:count]


def _bytes(y: Tensor) -> Tensor:
    """bool as uint8, in which 255 marks padding; float64 as float32, which models compute in."""
    return y.to(torch.uint8) if y.dtype == torch.bool else y.float() if y.is_floating_point() else y

"""The data modules: what every data set has in common, and the one for images that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor

from knep.config.schema import Described
from knep.data.loaders import EvalLoader, TrainLoader
from knep.data.splits import stratified, subset
from knep.errors import InputError

_STATISTICS_BATCH = 1024


@dataclass(frozen=True)
class Arrays:
    """A data set as read: images uint8 (N, C, H, W), labels int64 (N,) from 0, and the classes' names."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    class_names: Sequence[str]


def refuse_loaders(data: Any) -> None:
    """Raises InputError for what has no images to prepare: a run reads them, where Lightning asks for loaders."""
    if not callable(getattr(data, "prepare", None)):
        kind = "a LightningDataModule" if isinstance(data, L.LightningDataModule) else "no data module"
        raise InputError(
            f"data._target_: {type(data).__name__} is {kind}, and a run needs a subclass of "
            "knep.data.base.ImageData: write one, or use "
            "your own loaders with knep.load(...).lightning(model, num_classes) and .trainer()"
        )


class Images(Described, Protocol):
    """Prepared images in splits, as training and examination read them: an `ImageData`, or a stranger's loaders."""

    sizes: dict[str, int]
    seed: int

    @property
    def train_batches(self) -> int: ...

    def train_images(self) -> Iterable[Tensor]: ...

    def sample(self, count: int) -> Tensor: ...

    def train_dataloader(self) -> Any: ...

    def val_dataloader(self) -> Any: ...


class ImageData(L.LightningDataModule):
    """Images with labels in three splits; `prepare` must be called before anything else is read.

    After `prepare`: num_classes, channels, image_size (pixels of a side), class_names, sizes {"train", "val", "test"}.

    batch_size: global, split over the processes; val_share: of the training data, by class, in (0, 1); split_seed: of
    the validation split; seed: of the order of batches; limit: use only so many training images, by class;
    num_classes: refuses data with another number.
    """

    num_classes: int
    channels: int
    image_size: int
    class_names: list[str]
    sizes: dict[str, int]
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
            self._check()
            self._prepared = True

    def keep(self, facts: Mapping[str, Any]) -> None:
        """Before `prepare`: reads images as the run did whose checkpoint tells these facts, of `knep.engine.build`."""

    def setup(self, stage: str) -> None:
        self.prepare()

    def _read(self) -> None:
        raise NotImplementedError

    def _check(self) -> None:
        if self._wanted_classes is not None and self._wanted_classes != self.num_classes:
            raise InputError(
                f"data.num_classes={self._wanted_classes} but the data has {self.num_classes} classes: "
                f"write data.num_classes={self.num_classes} or null"
            )
        if self.batch_size > self.sizes["train"]:
            raise InputError(
                f"data.batch_size={self.batch_size} is larger than the training split of {self.sizes['train']} "
                f"images: write data.batch_size={self.sizes['train']} or less"
            )
        _, world = self._rank_world()
        if self.batch_size % world:
            raise InputError(f"data.batch_size={self.batch_size} must be a multiple of the {world} processes")

    def _rank_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    @property
    def train_batches(self) -> int:
        """Training batches of an epoch."""
        return len(self.train_dataloader())

    def train_dataloader(self) -> Any:
        raise NotImplementedError

    def train_images(self) -> Iterator[Tensor]:
        """The training split's images in batches, as they are: for statistics."""
        raise NotImplementedError

    def sample(self, count: int) -> Tensor:
        """The first training images (count, C, H, W), uint8: for tricks that look at the data."""
        raise NotImplementedError


class InMemory(ImageData):
    """A data set whose images lie on the training device; subclasses say how they are read, in `_arrays`."""

    def _arrays(self) -> Arrays:
        raise NotImplementedError

    def _read(self) -> None:
        data = self._arrays()
        self.class_names = list(data.class_names)
        self.num_classes = len(self.class_names)
        for part, y in (("training", data.train_y), ("test", data.test_y)):
            if not len(y):
                raise InputError(f"the {part} data has no images")
            if int(y.min()) < 0 or int(y.max()) >= self.num_classes:
                wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
                raise InputError(f"the {part} data has a label {wrong} out of range: labels go from 0 to "
                                 f"{self.num_classes - 1}")  # fmt: skip
        stay, off = stratified(data.train_y, self.val_share, self.split_seed)
        stay = stay[subset(data.train_y[stay], self.limit, self.split_seed)]
        self._splits = {
            "train": (data.train_x[stay], data.train_y[stay]),
            "val": (data.train_x[off], data.train_y[off]),
            "test": (data.test_x, data.test_y),
        }
        self.sizes = {name: len(y) for name, (_, y) in self._splits.items()}
        self.channels, self.image_size = int(data.train_x.shape[1]), int(data.train_x.shape[2])

    def _on_device(self, split: str) -> tuple[Tensor, Tensor]:
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        x, y = self._splits[split]
        if x.device != device:
            self._splits[split] = (x.to(device), y.to(device))
        return self._splits[split]

    def train_dataloader(self) -> TrainLoader:
        rank, world = self._rank_world()
        self._check()
        options = {"seed": self.seed, "drop_last": self.drop_last, "rank": rank, "world": world}
        return TrainLoader(*self._on_device("train"), self.batch_size, **options)

    def _eval(self, split: str) -> EvalLoader:
        rank, world = self._rank_world()
        return EvalLoader(*self._on_device(split), max(self.batch_size, 500), rank=rank, world=world)

    def val_dataloader(self) -> EvalLoader:
        return self._eval("val")

    def test_dataloader(self) -> EvalLoader:
        return self._eval("test")

    def train_images(self) -> Iterator[Tensor]:
        yield from self._splits["train"][0].split(_STATISTICS_BATCH)

    def sample(self, count: int) -> Tensor:
        return self._splits["train"][0][:count]

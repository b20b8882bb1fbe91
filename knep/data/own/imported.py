"""Loaders of somebody else's project, by the path of what gives them: their batches, read as a run reads its own."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from knep.data.base import ImageData, kind_of
from knep.errors import InputError
from knep.tasks.base import Split, Weighted, described, pair
from knep.utils.imports import find
from knep.utils.text import shown

_SPLITS = ("train", "val", "test")
_LOOKED_AT = 64  # batches of a loader without length that are looked at for means and counts
_WHOLE = (torch.int8, torch.int16, torch.int32)  # of classes, which losses take as int64
_EXAMPLE = "mypkg.data:loaders"


class Batches:
    """A loader's batches as (x, target), an epoch at a time.

    batches: of an epoch, where the loader has no length or another one is asked for: an iteration goes on where the
    last one ended, and begins again at the loader's end; None is the loader's own length.
    """

    def __init__(self, loader: Any, keys: Sequence[str] | None, batches: int | None = None) -> None:
        self.loader, self._keys, self._batches = loader, keys, batches
        self._running: Iterator[Any] | None = None
        self._start = self._position = 0

    def set_epoch(self, epoch: int) -> None:
        for part in (self.loader, getattr(self.loader, "sampler", None)):
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # pyright: ignore[reportOptionalMemberAccess]

    def __len__(self) -> int:
        return len(self.loader) if self._batches is None else self._batches

    def read(self, batch: Any) -> tuple[Tensor, Any]:
        """(x, target) of a batch. Raises InputError for what is none."""
        if isinstance(batch, Tensor) and self._keys is None:
            return batch, batch  # tokens, which are their own targets
        x, target = pair(batch, self._keys)
        plain = target.target if isinstance(target, Weighted) else target
        if not isinstance(plain, Tensor) or plain.dtype not in _WHOLE:
            return x, target
        return x, Weighted(plain.long(), target.weight) if isinstance(target, Weighted) else plain.long()

    def once(self, most: int | None = None) -> Iterator[tuple[Tensor, Any]]:
        """A pass of its own over the loader, of at most so many batches."""
        return map(self.read, itertools.islice(iter(self.loader), most))

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        first, self._start = self._start, 0
        for batch in range(len(self)):
            got = self._next(batch)
            if batch >= first:
                self._position = (batch + 1) % len(self)
                yield got if _is_read(got) else Split(*self.read(got))

    def _next(self, batch: int) -> Any:
        if self._running is None or (batch == 0 and self._batches is None):
            self._running = iter(self.loader)
        for _ in range(2):
            for got in self._running:
                return got
            self._running = iter(self.loader)
        raise InputError(f"the loader {type(self.loader).__name__} gives no batch: look at what it reads")

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = self._position = state_dict["position"]
        if self._start:
            _say(
                f"goes on at batch {self._start} of an epoch whose order your loader draws anew: some rows may be seen "
                "twice, others not in this epoch"
            )


class Imported(ImageData):
    """Batches that a project's own code gives: (x, y), (x, y, weight), or dicts with `batch=[input, target]`.

    path: "package.module:name" of a function that returns loaders (train, val) or (train, val, test), or a dict of
    them, or a LightningDataModule, its class, or a function that returns one. Without a test loader the validation data
    are what is told as test, with a line that says so.
    batch: two keys of a batch that is a dict; num_classes: of classes, tags or tokens, counted in a pass over the
    training loader where it is not given; max_steps: batches of an epoch where the training loader has no length;
    args: keywords for what path names.
    Raises InputError for a path that leads nowhere, what gives no loaders, and batches that are none.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        args: Mapping[str, Any] | None = None,
        batch: Sequence[str] | None = None,
        max_steps: int = -1,
        num_classes: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes=num_classes, seed=seed)
        if batch is not None and (not isinstance(batch, (list, tuple)) or len(batch) not in (2, 3)):
            raise InputError(f"data.batch={batch} must be two keys of a batch: write data.batch=[image,label]")
        self._asked = num_classes
        self._path, self._args, self._keys, self._max_steps = path, dict(args or {}), batch, max_steps

    def find(self) -> Callable[..., Any]:
        """What path names. Raises InputError naming the module, the attribute and what was found there."""
        return find(self._path, "data.path", _EXAMPLE, "gives the loaders")

    def _read(self) -> None:
        loaders = _loaders(self.find(), self._args, f"data.path={self._path}")
        length = None
        if _length(loaders["train"]) is None:
            if self._max_steps < 1:
                raise InputError("data.path gives a training loader without a length: write trainer.max_steps=1000")
            length = self._max_steps
        self._train = Batches(loaders["train"], self._keys, length)
        self._other = {split: Batches(loaders[split], self._keys, _rest(loaders[split])) for split in ("val", "test")}
        x, y = next(self._train.once(1), (None, None))
        if not isinstance(x, Tensor):
            raise InputError("data.path gives a training loader without a batch: look at what it reads")
        self.batch_size = len(x)
        target = y.target if isinstance(y, Weighted) else y
        if not isinstance(target, Tensor):
            raise InputError(f"data.path gives targets that are {described(target)}: give tensors")
        self._describe(x, target, loaders["train"])
        self.sizes = {split: _rows(loaders[split], self.batch_size, self._train) for split in _SPLITS}
        _say(f"{shown(str(self._path))}: batches of {described(x)} and {described(target)}")
        if loaders["test"] is loaders["val"]:
            _say("no test loader is given: what is told as test is of the validation data, which chose the epoch")
        _say("your loader draws its own order: resuming is exact at the ends of epochs")

    def _describe(self, x: Tensor, y: Tensor, loader: Any) -> None:
        self.target, self.dtype = kind_of(y), str(x.dtype).removeprefix("torch.")
        row = tuple(x.shape[1:])
        words = not x.is_floating_point() and x.dtype != torch.uint8 and len(row) == 1
        if self.target in ("number", "label"):
            width = 1 if y.ndim == 1 else y.shape[1]
            self.class_names = [f"{self.target} {k}" for k in range(width)]
        else:
            names = list(getattr(getattr(loader, "dataset", None), "classes", None) or ())
            count = self._asked or len(names) or self._counted(words and self.target == "token")
            self.class_names = [str(name) for name in names] if len(names) == count else [str(k) for k in range(count)]
        self.num_classes = len(self.class_names)
        if len(row) == 3 and row[1] == row[2]:
            self.channels, self.image_size = row[0], row[1]
            return
        self.shape = row
        if words:
            self.channels, self.image_size = self._vocabulary(), row[0]
        else:
            self.channels, self.image_size = row[0] if row else 1, row[-1] if len(row) > 1 else 1

    def _counted(self, tokens: bool) -> int:
        if _length(self._train.loader) is None:
            raise InputError(
                "data.path gives a training loader without a length, whose classes end nowhere: write data.num_classes"
            )
        most = 0
        for x, y in self._train.once():
            target = y.target if isinstance(y, Weighted) else y
            most = max(most, int(target.max()), int(x.max()) if tokens else 0)
        _say(
            f"{most + 1} classes are counted in a pass over the training loader: data.num_classes={most + 1} spares it"
        )
        return most + 1

    def _vocabulary(self) -> int:
        if self.target == "token":
            return self.num_classes
        return 1 + max(int(x.max()) for x, _ in self._train.once(None if _length(self._train.loader) else _LOOKED_AT))

    def check_sizes(self) -> None:
        if self._asked not in (None, self.num_classes):
            raise InputError(f"data.num_classes={self._asked} but the targets are {self.num_classes} numbers a row")
        if self.rank_world()[1] > 1:
            raise InputError("data=import trains in one process, whose loader splits nothing: write trainer.devices=1")

    @property
    def train_batches(self) -> int:
        return len(self._train)

    def train_dataloader(self) -> Batches:
        self.check_sizes()
        return self._train

    def val_dataloader(self) -> Batches:
        return self._other["val"]

    def test_dataloader(self) -> Batches:
        return self._other["test"]

    def _some(self) -> Iterator[tuple[Tensor, Any]]:
        return self._train.once(None if _length(self._train.loader) is not None else _LOOKED_AT)

    def train_images(self) -> Iterator[Tensor]:
        for x, _ in self._some():
            yield x

    def train_targets(self) -> Iterator[Tensor]:
        for _, y in self._some():
            yield y.target if isinstance(y, Weighted) else y

    def sample(self, count: int) -> Tensor:
        found, rows = [], 0
        for x, _ in self._train.once(_LOOKED_AT):
            found.append(x)
            rows += len(x)
            if rows >= count:
                break
        return torch.cat(found)[:count]


def _is_read(batch: Any) -> bool:
    """Whether a batch is (x, target) as losses take it."""
    return isinstance(batch, tuple) and len(batch) == 2 and getattr(batch[1], "dtype", None) not in _WHOLE


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # of an IterableDataset
        return None


def _rest(loader: Any) -> int | None:
    """Batches of an evaluation loader without a length, which has to end: they are counted once."""
    return None if _length(loader) is not None else sum(1 for _ in loader)


def _rows(loader: Any, size: int, train: Batches) -> int:
    dataset, length = getattr(loader, "dataset", None), _length(loader)
    if length is not None and dataset is not None and callable(getattr(dataset, "__len__", None)):
        return len(dataset)
    return size * (len(train) if length is None else length)


def _loaders(builder: Any, args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The loaders of each split."""
    try:
        found = builder if isinstance(builder, L.LightningDataModule) else builder(**args)
        if isinstance(found, L.LightningDataModule):
            return _of_module(found, where)
    except InputError:
        raise
    except Exception as error:  # code of another project may raise anything
        raise InputError(f"{where} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if isinstance(found, Mapping):
        found = tuple(found.get(split) for split in _SPLITS if found.get(split) is not None)
    if (
        not isinstance(found, (tuple, list))
        or len(found) not in (2, 3)
        or not all(hasattr(f, "__iter__") for f in found)
    ):
        raise InputError(f"{where} gave {_said(found)}: return loaders (train, val) or (train, val, test)")
    return {"train": found[0], "val": found[1], "test": found[-1]}


def _of_module(module: L.LightningDataModule, where: str) -> dict[str, Any]:
    module.prepare_data()
    module.setup("fit")
    found = {"train": module.train_dataloader(), "val": module.val_dataloader()}
    own = type(module).test_dataloader is not L.LightningDataModule.test_dataloader
    if own:
        module.setup("test")
    found["test"] = module.test_dataloader() if own else found["val"]
    several = next((name for name, loader in found.items() if isinstance(loader, (list, tuple, dict))), None)
    if several is not None:
        raise InputError(f"{where} gives several loaders for {several}: let {several}_dataloader give one")
    return found


def _said(found: Any) -> str:
    if isinstance(found, (tuple, list)):
        return f"{len(found)} parts ({', '.join(type(part).__name__ for part in found[:4])})"
    return f"a {type(found).__name__}"


def _say(line: str) -> None:
    print(f"knep: {line}", file=sys.stderr)

"""CIFAR-10 and CIFAR-100 from their python batches, opened by a reader that can build arrays and nothing else."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knep.data.base import Arrays, InMemory
from knep.data.locate import find_folder
from knep.errors import InputError

_TEXT = (bytes, str)


class _ArraysOnly(pickle.Unpickler):
    """Finds no class but numpy's arrays: a pickle that names anything else is refused before it runs."""

    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get((module.replace("numpy.core", "numpy._core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found


def _empty(kind: object, shape: object, code: object) -> np.ndarray:
    """All that `_reconstruct` is for: an array without values, which its state gives it."""
    return np.empty(0, np.uint8)


def _dtype(code: object, *about: object) -> np.dtype:
    if code not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"it has numbers of type {str(code)[:20]}")
    return np.dtype("u1")


def _latin1(text: str, encoding: str) -> bytes:
    """All that `_codecs.encode` is for in a pickle of bytes by protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes with {encoding}")
    return text.encode("latin1")


# What numpy's arrays of bytes pickle to, under its names since version 2.
_KNOWN = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _dtype,
    ("numpy._core.multiarray", "_reconstruct"): _empty,
    ("_codecs", "encode"): _latin1,
}


def _check_memo(content: bytes) -> None:
    """The memo of a pickle is as long as its largest number says, and Python takes that memory at once."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > len(content):
            raise pickle.UnpicklingError("its memo is longer than the file")


def read_batch(path: Path) -> dict[str, Any]:
    """The dict in a python batch file, keys as text. Raises InputError for anything but arrays, text and lists."""
    try:
        content = path.read_bytes()
        _check_memo(content)
        raw = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        MemoryError,
        RecursionError,
    ) as e:
        raise InputError(f"{path} is no CIFAR batch ({' '.join(str(e).split())[:80]}): get the file again") from e
    if not isinstance(raw, dict):
        raise InputError(f"{path} is no CIFAR batch: it holds a {type(raw).__name__}")
    return {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in raw.items()}


class Cifar10(InMemory):
    """Ten classes, 32 x 32, three channels, 50,000 and 10,000 images (Krizhevsky 2009)."""

    folder = "cifar-10-batches-py"
    train_files: tuple[str, ...] = tuple(f"data_batch_{i}" for i in range(1, 6))
    test_files: tuple[str, ...] = ("test_batch",)
    meta = ("batches.meta", "label_names")
    labels = "labels"

    def _arrays(self) -> Arrays:
        needed = (*self.train_files, *self.test_files, self.meta[0])
        name = type(self).__name__
        folder = find_folder(name, self.root, needed, [Path("."), Path(self.folder)], self.downloader)
        names = read_batch(folder / self.meta[0]).get(self.meta[1])
        if not isinstance(names, list) or not 2 <= len(names) <= 1000 or not all(isinstance(n, _TEXT) for n in names):
            raise InputError(f"{folder / self.meta[0]} has no list {self.meta[1]} of names: get the file again")
        train, test = self._images(folder, self.train_files), self._images(folder, self.test_files)
        return Arrays(*train, *test, [n.decode("latin1") if isinstance(n, bytes) else n for n in names])

    def _images(self, folder: Path, files: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        xs, ys = [], []
        for file in files:
            batch = read_batch(folder / file)
            x, y = batch.get("data"), batch.get(self.labels)
            shape = getattr(x, "shape", None)
            if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072:
                raise InputError(f"{folder / file} should hold images of 3,072 bytes each, and holds {shape}")
            if not isinstance(y, list) or len(y) != len(x):
                raise InputError(f"{folder / file} has {len(y) if isinstance(y, list) else 'no'} {self.labels} for "
                                 f"{len(x)} images")  # fmt: skip
            if not all(isinstance(label, int) and 0 <= label < 1000 for label in y):
                raise InputError(f"{folder / file} has {self.labels} that are no classes: get the file again")
            xs.append(torch.from_numpy(x.reshape(-1, 3, 32, 32).copy()))
            ys.append(torch.tensor(y, dtype=torch.int64))
        return torch.cat(xs), torch.cat(ys)

    def _download(self, root: Path) -> None:
        from torchvision.datasets import CIFAR10

        CIFAR10(str(root), download=True)


class Cifar100(Cifar10):
    """A hundred classes, 32 x 32, three channels, 50,000 and 10,000 images (Krizhevsky 2009)."""

    folder = "cifar-100-python"
    train_files = ("train",)
    test_files = ("test",)
    meta = ("meta", "fine_label_names")
    labels = "fine_labels"

    def _download(self, root: Path) -> None:
        from torchvision.datasets import CIFAR100

        CIFAR100(str(root), download=True)

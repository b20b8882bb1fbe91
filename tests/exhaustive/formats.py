"""Small data sets of noise in the true file formats, for runs that need no download.

Each function writes `images` training images, and a test split, under `root`, and returns the override line that reads
them; `data.root=ROOT` is the caller's. Pixels are uint8 noise of a fixed seed, labels go round the classes.
"""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

TESTS = 20  # images of the test split; CIFAR-100 has one of each class


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def mnist(root: Path, images: int, suffix: str = "") -> str:
    """idx files, 28x28; suffix: ".gz" compresses them."""
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", images), ("t10k", TESTS)):
        for kind, array in (("images-idx3", _noise(count, 28, 28)), ("labels-idx1", np.arange(count) % 10)):
            magic = 0x0800 + array.ndim  # 08 stands for uint8
            content = struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()
            path = root / f"{part}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content, mtime=0) if suffix else content)
    return "data=mnist"


def cifar10(root: Path, images: int, protocol: int = 2) -> str:
    """Five pickled batches and one for testing, 3x32x32. images: a multiple of 5."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    meta = {"label_names": [f"thing {k}".encode() for k in range(10)]}
    (base / "batches.meta").write_bytes(pickle.dumps(meta, protocol))
    for name, count in (*((f"data_batch_{i}", images // 5) for i in range(1, 6)), ("test_batch", TESTS)):
        batch = {"data": _noise(count, 3072), "labels": [k % 10 for k in range(count)]}
        (base / name).write_bytes(pickle.dumps(batch, protocol))
    return "data=cifar10"


def cifar100(root: Path, images: int) -> str:
    """One pickle for training and one for testing, 3x32x32."""
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing {k}" for k in range(100)]}, 2))
    for name, count in (("train", images), ("test", 100)):
        batch = {"data": _noise(count, 3072), "fine_labels": [k % 100 for k in range(count)]}
        (base / name).write_bytes(pickle.dumps(batch, 2))
    return "data=cifar100"


def svhn(root: Path, images: int) -> str:
    """Matlab files, 32x32x3xN; the label 10 stands for the digit 0."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", images), ("test", TESTS)):
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        savemat(root / f"{part}_32x32.mat", {"X": _noise(32, 32, 3, count), "y": labels})
    return "data=svhn"


FORMATS: dict[str, Callable[[Path, int], str]] = {
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
}

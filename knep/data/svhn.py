"""Street View House Numbers from their .mat files (Netzer et al. 2011)."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from knep.data.base import Arrays, InMemory
from knep.data.locate import allowance, find_folder
from knep.data.matlab import read_bytes_arrays
from knep.errors import InputError

_FILES = ("train_32x32.mat", "test_32x32.mat")


def read_mat(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels (N,); the file's label 10 means the digit 0. Raises InputError."""
    try:
        raw = read_bytes_arrays(path, ("X", "y"), allowance(path.stat().st_size))
    except (OSError, ValueError, struct.error, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())[:80]}): get the file again") from error
    x, y = raw.get("X"), raw.get("y")
    if x is None or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise InputError(f"{path} has no images X of 32 x 32 x 3 bytes: get the file again")
    if y is None or y.size != x.shape[3]:
        raise InputError(f"{path} has no label y for each of its {x.shape[3]} images: get the file again")
    labels = torch.from_numpy(y.astype(np.int64).ravel())
    return torch.from_numpy(np.ascontiguousarray(x.transpose(3, 2, 0, 1))), labels.where(labels != 10, 0)


class Svhn(InMemory):
    """House numbers, ten classes, 32 x 32, three channels, 73,257 and 26,032 images."""

    def _arrays(self) -> Arrays:
        folder = find_folder("SVHN", self.root, _FILES, [Path("."), Path("svhn")], self.downloader)
        (x, y), (test_x, test_y) = (read_mat(folder / file) for file in _FILES)
        return Arrays(x, y, test_x, test_y, [str(k) for k in range(10)])

    def _download(self, root: Path) -> None:
        from torchvision.datasets import SVHN

        for split in ("train", "test"):
            SVHN(str(root), split=split, download=True)

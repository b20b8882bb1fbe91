"""MNIST and its relatives in idx files (LeCun's format): every size is checked before memory is taken."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from knep.data.base import Arrays, InMemory
from knep.data.locate import allowance, find_folder, resolve
from knep.errors import InputError

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_UBYTE = 0x08


def read_idx(path: Path) -> Tensor:
    """The uint8 array in an idx file, plain or .gz. Raises InputError where file and header disagree."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as f:
            start = f.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or start[2] != _UBYTE or start[3] not in (1, 3):
                raise InputError(f"{path} is no idx file of bytes: its first four bytes are {start.hex() or 'missing'}")
            header = f.read(4 * start[3])
            if len(header) < 4 * start[3]:
                raise InputError(f"{path} is truncated in its header: get the file again")
            shape = struct.unpack(f">{start[3]}I", header)
            size = 1
            for n in shape:
                size *= n
            held = allowance(path.stat().st_size) if path.suffix == ".gz" else path.stat().st_size - 4 - len(header)
            if size > held:
                raise InputError(f"{path} is truncated: its header says {size} bytes, it can hold {held}")
            content = f.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}): get the file again") from error
    if len(content) != size:
        more = "more" if len(content) > size else f"only {len(content)}"
        raise InputError(f"{path} does not fit its header: {size} bytes are promised, it holds {more}")
    if not size:
        raise InputError(f"{path} holds no images")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape)


class Mnist(InMemory):
    """Handwritten digits, 28 x 28, one channel, 60,000 and 10,000 images (LeCun et al. 1998)."""

    names: tuple[str, ...] = tuple(str(k) for k in range(10))
    places: tuple[str, ...] = (".", "MNIST/raw", "mnist")

    def _arrays(self) -> Arrays:
        places = [Path(p) for p in self.places]
        folder = find_folder(type(self).__name__, self.root, _FILES, places, self.downloader)
        parts = [read_idx(resolve(folder, file)) for file in _FILES]
        for (x, y), file in (((parts[0], parts[1]), _FILES[1]), ((parts[2], parts[3]), _FILES[3])):
            if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
                raise InputError(f"{resolve(folder, file)} has {len(y)} labels for {len(x)} images")
            if x.shape[1] != x.shape[2] or x.shape[1:] != parts[0].shape[1:]:
                raise InputError(f"{folder} has images of {x.shape[1]} x {x.shape[2]} pixels: they must be square, all "
                                 "of one size")  # fmt: skip
        x, y, test_x, test_y = parts
        return Arrays(x[:, None], y.long(), test_x[:, None], test_y.long(), self.names)

    def _download(self, root: Path) -> None:
        from torchvision.datasets import MNIST

        MNIST(str(root), download=True)


class FashionMnist(Mnist):
    """Zalando's articles, in MNIST's format (Xiao, Rasul and Vollgraf 2017)."""

    names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    # The last is where Debian's package dataset-fashion-mnist puts them.
    places = (".", "FashionMNIST/raw", "fashion-mnist", "/usr/share/datasets/fashion-mnist")

    def _download(self, root: Path) -> None:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(root), download=True)

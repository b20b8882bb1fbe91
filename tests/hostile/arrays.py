"""Data sets in files of arrays: headers that promise memory, pickles that call, streams that unpack without end."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .attack import Attack, Place
from .bombs import bomb
from .checkpoints import Call, named, touch

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def mnist(file: int, content: Callable[[], bytes], suffix: str = "") -> Attack:
    """MNIST's four files, one of them replaced."""

    def build(place: Place) -> list[str]:
        for i, name in enumerate(IDX):
            count = 100 if i < 2 else 20
            if i == file:
                (place.work / f"{name}{suffix}").write_bytes(content())
            elif i % 2:
                (place.work / name).write_bytes(struct.pack(">II", 2049, count) + bytes(k % 10 for k in range(count)))
            else:
                (place.work / name).write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + bytes(count * 784))
        return ["mnist", f"data.root={place.work}", "data.batch_size=10"]

    return Attack("read", build)


def cifar(content: Callable[[Place], bytes], file: str = "data_batch_3") -> Attack:
    """CIFAR-10's batches, one of them replaced."""

    def build(place: Place) -> list[str]:
        base = place.work / "cifar-10-batches-py"
        base.mkdir()
        batch = {"data": np.zeros((20, 3072), np.uint8), "labels": [k % 10 for k in range(20)]}
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            (base / name).write_bytes(pickle.dumps(batch, 2))
        (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{k}" for k in range(10)]}, 2))
        (base / file).write_bytes(content(place))
        return ["cifar10", f"data.root={place.work}", "data.batch_size=10"]

    return Attack("read", build, file)


def svhn(content: Callable[[], bytes]) -> Attack:
    def build(place: Place) -> list[str]:
        for name in ("train_32x32.mat", "test_32x32.mat"):
            (place.work / name).write_bytes(content())
        return ["svhn", f"data.root={place.work}", "data.batch_size=10"]

    return Attack("read", build, "train_32x32.mat")


def part(kind: int, content: bytes, size: int | None = None) -> bytes:
    return struct.pack("<II", kind, len(content) if size is None else size) + content + bytes(-len(content) % 8)


def array(
    shape: tuple[int, ...], values: bytes, name: bytes = b"X", flags: int = 9, promised: int | None = None
) -> bytes:
    """A MATLAB array as an element; flags: its class, 9 for bytes, 1 for cells."""
    content = part(6, struct.pack("<II", flags, 0)) + part(5, struct.pack(f"<{len(shape)}i", *shape)) + part(1, name)
    return part(14, content + part(2, values, promised))


MAT = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


def packed(start: bytes, size: int) -> bytes:
    """A compressed element of `start` and very many zeros."""
    return part(15, bomb(start, size))


def zeros(header: bytes, size: int) -> bytes:
    """A gzip file of a header and very many zeros."""
    return bomb(header, size, 31)


def cells(depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        head = part(6, struct.pack("<II", 1, 0)) + part(5, struct.pack("<2i", 1, 1)) + part(1, b"X")
        content = part(14, head + content)
    return content


def nested(depth: int) -> list[Any]:
    node: list[Any] = [b"a"]
    for _ in range(depth):
        node = [node, node]
    return node


def labels(value: Any) -> bytes:
    return pickle.dumps({"data": np.zeros((20, 3072), np.uint8), "labels": value}, 2)


def reduced(function: Any, *args: Any) -> bytes:
    return pickle.dumps({"data": Call(function, *args), "labels": [0]}, 2)


GIANT = 2**31 - 1
ATTACKS = {
    "idx: giant count": mnist(0, lambda: struct.pack(">IIII", 2051, GIANT, 28, 28) + bytes(784)),
    "idx: giant in every axis": mnist(0, lambda: struct.pack(">IIII", 2051, *[2**32 - 1] * 3)),
    "idx: a shape of zero": mnist(0, lambda: struct.pack(">IIII", 2051, 0, 28, 28)),
    "idx: images of no width": mnist(0, lambda: struct.pack(">IIII", 2051, 100, 0, 28)),
    "idx: images that are not square": mnist(0, lambda: struct.pack(">IIII", 2051, 100, 1, 784) + bytes(78400)),
    "idx: other sizes than the test's": mnist(2, lambda: struct.pack(">IIII", 2051, 20, 14, 14) + bytes(20 * 196)),
    "idx: numbers that are no bytes": mnist(0, lambda: struct.pack(">IIII", 0x0D03, 100, 28, 28) + bytes(313600)),
    "idx: eighty axes": mnist(0, lambda: b"\0\0\x08\x50" + bytes(400)),
    "idx: gzip bomb": mnist(0, lambda: zeros(struct.pack(">IIII", 2051, 1 << 20, 28, 28), 822 << 20), ".gz"),
    "idx: gzip without end": mnist(0, lambda: zeros(struct.pack(">IIII", 2051, 100, 28, 28), 600 << 20), ".gz"),
    "idx: gzip within its header": mnist(1, lambda: gzip.compress(b"\0\0\x08\x01")[:-9], ".gz"),
    "idx: all labels alike": mnist(1, lambda: struct.pack(">II", 2049, 100) + b"\xff" * 100),
    "cifar: os.system": cifar(lambda p: pickle.dumps(Call(os.system, touch(p)), 2)),
    "cifar: eval by name": cifar(lambda p: named("__builtin__", "eval", "open('../outside/canary', 'w')")),
    "cifar: a gadget within a list": cifar(lambda p: labels([0, Call(os.system, touch(p))])),
    "cifar: numpy.load": cifar(lambda p: named("numpy", "load", "../outside/secret")),
    "cifar: numpy.memmap": cifar(lambda p: named("numpy", "memmap", "../outside/canary", "u1", "w+", 0, (9,))),
    "cifar: an array of terabytes": cifar(lambda p: named("numpy", "ndarray", (10**13,))),
    "cifar: an array of 2 GB": cifar(lambda p: reduced(np.zeros(1).__reduce__()[0], np.ndarray, (2 << 30,), b"b")),
    "cifar: a type of 2 GB": cifar(lambda p: reduced(np.dtype, f"V{GIANT}")),
    "cifar: an array of objects": cifar(
        lambda p: pickle.dumps({"data": np.array([[Call(os.system, touch(p))]], dtype=object), "labels": [0]}, 2)
    ),
    "cifar: memo of 2 billion": cifar(lambda p: b"\x80\x02}r\xff\xff\xff\x7f."),
    "cifar: bytes of 4 GB declared": cifar(lambda p: b"\x80\x03B\xff\xff\xff\xffabc."),
    "cifar: lists a hundred thousand deep": cifar(lambda p: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "cifar: labels that laugh": cifar(lambda p: labels(nested(40) + [0] * 18)),
    "cifar: labels of a million digits": cifar(lambda p: labels([1 << 4_000_000] * 20)),
    "cifar: labels of text": cifar(lambda p: labels(["0"] * 20)),
    "cifar: names that laugh": cifar(lambda p: pickle.dumps({"label_names": nested(40)}, 2), "batches.meta"),
    "cifar: a million names": cifar(lambda p: pickle.dumps({"label_names": [b"a"] * 10**6}, 2), "batches.meta"),
    "svhn: giant shape": svhn(lambda: MAT + array((32, 32, 3, GIANT), bytes(64))),
    "svhn: negative shape": svhn(lambda: MAT + array((32, 32, -3, -1), bytes(64))),
    "svhn: giant part": svhn(lambda: MAT + array((32, 32, 3, 1), bytes(3072), promised=2**32 - 1)),
    "svhn: giant element": svhn(lambda: MAT + struct.pack("<II", 14, 2**32 - 1)),
    "svhn: zip bomb": svhn(
        lambda: MAT + packed(array((32, 32, 3, 280_000), b"", promised=860_160_000), 820 << 20)
    ),
    "svhn: unpacks without end": svhn(lambda: MAT + packed(array((32, 32, 3, 1), b""), 600 << 20)),
    "svhn: cells within cells": svhn(lambda: MAT + cells(2_000)),
    "svhn: empty": svhn(lambda: b""),
    "svhn: text": svhn(lambda: b"<html>404</html>" * 99),
}  # fmt: skip

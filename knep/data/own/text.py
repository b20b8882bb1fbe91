"""Files as rows of bytes, for a model of the next one: any file is text of 256 tokens, and nothing has to be learned of
it before.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knep.config.budget import check_room
from knep.data.base import Arrays, InMemory
from knep.data.splits import at_random
from knep.errors import InputError
from knep.utils.rng import generator
from knep.utils.text import shown

_VOCABULARY = 256
_END = b"\0"  # between two files
_FILES = 1_000_000
_COST = 18  # bytes in memory for one in a file: as int64, and once more while rows are cut
_ENOUGH = 10  # files, from which on they are split whole


class Text(InMemory):
    """Bytes of files as rows int64 (N, length), which are their own targets: each byte's is the next (task=tokens).

    Rows follow each other and share one byte, so that each byte but a split's first is predicted once. Files of a split
    stand in alphabetical order with a byte 0 between them.

    path: a file, or a folder, which is read with all folders below it; glob: names of files in it that count; length:
    bytes of a row, at least 2; split: "files" gives each file to one split, by split_seed, "position" the end of each
    file to validation and test, "auto" chooses files from ten on; test_share: of all bytes, in (0, 1); limit: rows.
    Raises InputError where there is no such file, none that is not empty, or less text than a row for each split.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        glob: str = "*",
        length: int = 128,
        split: str = "auto",
        test_share: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not isinstance(length, int) or length < 2:
            raise InputError(f"data.length={length} must be a whole number of bytes, at least 2")
        if split not in ("auto", "files", "position"):
            raise InputError(f"data.split={split} must be auto, files or position")
        if not 0 < test_share < 1 or self.val_share + test_share >= 1:
            raise InputError(f"data.test_share={test_share} must be in (0, 1), and leave something with data.val_share")
        if not isinstance(glob, str) or not glob:
            raise InputError(f"data.glob={glob} must be a pattern of names, such as *.txt")
        self._path, self._glob, self._length, self._split, self._test_share = path, glob, length, split, test_share

    def _arrays(self) -> Arrays:
        if not self._path or not isinstance(self._path, str):
            raise InputError("data.path is missing: write data.path=FOLDER, or a file")
        root = Path(self.root or "") / Path(self._path).expanduser()
        files = files_in(root, self._glob)
        total = sum(path.stat().st_size for path in files)
        check_room(_COST * total, f"{total:,} bytes of {shown(root)} need", "name fewer by data.glob")
        texts = [text for text in map(_read, files) if text]
        if not texts:
            raise InputError(f"{shown(root)} has no text: all of its {len(files):,} files are empty")
        whole = self._split == "files" or (self._split == "auto" and len(texts) >= _ENOUGH)
        parts = self._by_files(texts) if whole else self._by_position(texts)
        train, val, test = (
            self._rows(name, part) for name, part in zip(("training", "val", "test"), parts, strict=True)
        )
        if self.limit is not None and self.limit < len(train):
            train = train[at_random(len(train), 0, self.split_seed, self.limit)[0]]
        how = "by whole files" if whole else "by position"
        print(
            f"knep: {len(texts):,} files, {total:,} bytes, split {how}: rows of {self._length} bytes", file=sys.stderr
        )
        return Arrays(train, train, test, test, [_name(k) for k in range(_VOCABULARY)], val_x=val, val_y=val)

    def _by_files(self, texts: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
        """Files in a random order fill the test, then the validation, to the share of bytes that these should have."""
        if len(texts) < 3:
            raise InputError(
                f"data.split=files needs a file for each of three splits, got {len(texts)}: write position"
            )
        order = torch.randperm(len(texts), generator=generator(self.split_seed, 6)).tolist()
        total = sum(map(len, texts))
        held: list[list[int]] = []
        for share in (self._test_share, self.val_share):
            part = [order.pop()]
            size = len(texts[part[0]])
            while size < share * total and len(order) > 2 - len(held):
                part.append(order.pop())
                size += len(texts[part[-1]])
            held.append(part)
        test, val = (_END.join(texts[k] for k in sorted(part)) for part in held)
        return _END.join(texts[k] for k in sorted(order)), val, test

    def _by_position(self, texts: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
        """The beginning of each file, then its last parts."""
        ends = [
            (round(len(t) * (1 - self.val_share - self._test_share)), round(len(t) * (1 - self._test_share)))
            for t in texts
        ]
        pieces = [(t[:a], t[a:b], t[b:]) for t, (a, b) in zip(texts, ends, strict=True)]
        train, val, test = (_END.join(part) for part in zip(*pieces, strict=True))
        return train, val, test

    def _rows(self, name: str, text: bytes) -> Tensor:
        """(N, length): rows that begin with the last byte of the one before."""
        step = self._length - 1
        count = (len(text) - 1) // step
        if count < 1:
            raise InputError(
                f"{len(text):,} bytes of text are left for {name}, less than data.length={self._length}: write less"
            )
        flat = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return flat.unfold(0, self._length, step).long()


def _name(byte: int) -> str:
    return chr(byte) if 32 < byte < 127 else f"0x{byte:02x}"


def files_in(root: Path, glob: str = "*") -> list[Path]:
    """The files of a folder and all below it whose names match, in alphabetical order; or the one file that root is.

    Names that begin with a dot are left out; links are followed to nothing outside of the folder, and to no folder.
    Raises InputError where there are none, or too many.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise InputError(f"{shown(root)} is missing, or no file or folder: give one with text")
    found: list[Path] = []
    inside = os.path.realpath(root)
    for path in _walk(root, glob):
        real = os.path.realpath(path)
        if path.is_symlink() and not real.startswith(f"{inside}{os.sep}"):
            raise InputError(f"{shown(path)} is a link that leaves {shown(root)}: remove it, or copy what it shows")
        found.append(path)
        if len(found) > _FILES:
            raise InputError(f"{shown(root)} has more than {_FILES:,} files: name fewer by data.glob")
    if not found:
        raise InputError(f"{shown(root)} has no file {shown(glob)}: give another folder, or another data.glob")
    return found


def _walk(root: Path, glob: str) -> Iterator[Path]:
    for here, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(here, name)
            if not name.startswith(".") and path.match(glob) and path.exists() and stat.S_ISREG(path.stat().st_mode):
                yield path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{shown(path)} cannot be read ({error.strerror}): allow reading it, or leave it out"
        ) from error

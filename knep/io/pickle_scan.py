"""What a checkpoint file holds, looked through before torch reads it: torch takes memory for whatever a file declares.

`torch.load(weights_only=True)` runs no code of the file's, but it unpacks compressed records, calls `bytearray(10**10)`
or `torch.FloatTensor(10**10)` where a pickle says so, and hands on data that holds itself or doubles at each level.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SLACK = 64 << 20  # bytes that tensors may have beyond four times their file: views of one storage are counted each
_NODES, _DEPTH = 1_000_000, 64
_ITEMS = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
          "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1}  # fmt: skip
_NOT_OURS = "is not a checkpoint that knep wrote"


def foreign(path: Path) -> str | None:
    """Why a file is no plain checkpoint, or None. Nothing in it is run, unpacked, or given memory that it declares."""
    try:
        with path.open("rb") as f:
            if f.read(4) != b"PK\3\4":
                return f"{_NOT_OURS} (it is no zip archive)"
        with zipfile.ZipFile(path) as archive:
            sizes = _records(archive, path.stat().st_size)
            name = next((n for n in sizes if n.endswith("/data.pkl")), "")
            data = archive.read(name) if name.count("/") == 1 else b""
        if not data.startswith(b"\x80\x02") or any(n.endswith("/constants.pkl") for n in sizes):
            return f"{_NOT_OURS} (it has no data.pkl of torch.save)"
        survey = _Survey(data, name.removesuffix("data.pkl"), sizes)
        _walk(survey.load())
        if survey.bytes > 4 * path.stat().st_size + _SLACK:
            return f"{_NOT_OURS} (its tensors have {survey.bytes:,} bytes, more than the file)"
    except pickle.UnpicklingError as error:
        return f"{_NOT_OURS} ({error})"
    except zipfile.BadZipFile:
        return "is truncated or damaged"
    except Exception as error:  # a pickle that is none fails in as many ways as there are opcodes
        return f"{_NOT_OURS} ({type(error).__name__})"
    return None


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Record -> bytes, all of them stored as they are, each once."""
    infos = archive.infolist()
    sizes = {i.filename: i.file_size for i in infos}
    if any(i.compress_type != zipfile.ZIP_STORED or i.compress_size != i.file_size for i in infos):
        raise pickle.UnpicklingError("its records are compressed")
    if len(sizes) != len(infos) or sum(sizes.values()) > size:
        raise pickle.UnpicklingError("its records overlap")
    return sizes


class _Named:
    """Stands for a tensor, dtype or device; never the real one."""


class _Kind:
    """Stands for a class of storages; item: bytes of an element."""

    def __init__(self, item: int) -> None:
        self.item = item


class _Survey(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]  # in C its memo is as long as it says
    """Loads a pickle with a stand-in for everything that torch would build, and counts the bytes of the tensors."""

    def __init__(self, data: bytes, root: str, sizes: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(data), fix_imports=False)
        self._root, self._sizes = root, sizes
        self.bytes = 0
        self._known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "Counter"): Counter,
            ("__builtin__", "set"): set,
            ("_codecs", "encode"): _encode,
            ("torch", "Size"): tuple,
            ("torch", "device"): lambda *about: _Named(),
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *about: data,
        }

    def find_class(self, module: str, name: str) -> Any:
        found = self._known.get((module, name))
        if found is not None:
            return found
        known = getattr(torch, name, None) if module == "torch" else None
        if isinstance(known, torch.dtype):
            return _Named()
        if module in ("torch", "torch.storage") and name.endswith("Storage") and name[:-7] in _ITEMS:
            return _Kind(_ITEMS[name[:-7]])
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> int:
        """Bytes of the storage, counted in the file."""
        what, kind, key, _, count = pid
        held = self._sizes.get(f"{self._root}data/{key}")
        if what != "storage" or not isinstance(kind, _Kind) or held != kind.item * count:
            raise pickle.UnpicklingError(f"a tensor's {count} numbers are not in it")
        return count

    def _tensor(self, held: int, offset: int, size: Any, stride: Any, *about: Any) -> _Named:
        numbers, last = 1, offset
        for n, step in zip(size, stride, strict=True):
            numbers, last = numbers * n, last + (n - 1) * step
        if min(offset, *size, *stride, 0) < 0 or (numbers and last >= held):
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        self.bytes += 8 * numbers
        return _Named()


def overlaps(t: Tensor) -> bool:
    """Whether numbers of a tensor may lie on one another in memory, as those of an expanded one do."""
    span = 1
    for step, size in sorted((step, size) for step, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if step < span:
            return t.numel() > 0
        span += step * (size - 1)
    return False


def _encode(text: str, encoding: str) -> bytes:
    """All that `_codecs.encode` is for in a pickle of bytes by protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes with {encoding}")
    return text.encode("latin1")


def _is_metadata(value: object, depth: int = 0) -> bool:
    """Whether it says what a state_dict's `_metadata` does: versions, by names of modules and of their parts."""
    if depth == 3 or not isinstance(value, dict):
        return isinstance(value, int) and depth > 1
    return all(isinstance(k, str) and _is_metadata(v, depth + 1) for k, v in value.items())


def _walk(tree: object) -> None:
    """Refuses what holds itself, or is more than its file can be: every branch is counted where it hangs."""
    branches, nodes = [(tree, 0)], 0
    while branches:
        node, depth = branches.pop()
        held: list[Any] = []
        if isinstance(node, dict):
            held = [*dict.keys(node), *dict.values(node)]
            beside = dict(getattr(node, "__dict__", ()))
            if not _is_metadata(beside.pop("_metadata", {})) or beside:
                raise pickle.UnpicklingError("a dict has attributes")
        elif isinstance(node, (list, tuple, set)):
            held = list(node)
        nodes += len(held)
        if nodes > _NODES or depth > _DEPTH:
            raise pickle.UnpicklingError("its data has no end")
        branches += [(value, depth + 1) for value in held]

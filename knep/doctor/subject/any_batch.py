"""Batches of any form, tensors within tuples and dicts: which rows they have, a few of them, and the rows as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TARGETS = ("y", "label", "labels", "target", "targets", "mask", "masks", "label_ids", "tgt")


WEIGHTS = ("weight", "weights", "sample_weight", "sample_weights", "row_weight", "loss_weight")


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        made = {key: mapped(part, change) for key, part in value.items()}
        try:
            return type(value)(made)  # pyright: ignore[reportCallIssue]
        except TypeError:
            return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, change) for part in value))
    if type(value) in (tuple, list):
        return type(value)(mapped(part, change) for part in value)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor within, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part)


def first(value: Any) -> Tensor | None:
    """The first tensor with rows, None without one."""
    return next((t for t in tensors(value) if t.ndim), None)


def row_axis(t: Tensor, rows: int) -> int | None:
    """The axis along which a tensor has its rows: the first, or the second of (steps, rows, ...); None without."""
    if t.ndim and t.shape[0] == rows:
        return 0
    return 1 if t.ndim > 1 and t.shape[1] == rows else None


def taken(value: Any, rows: int, index: Tensor) -> Any:
    """Some rows of a batch that has `rows` of them."""

    def some(t: Tensor) -> Tensor:
        axis = row_axis(t, rows)
        return t if axis is None else t.index_select(axis, index.to(t.device))

    if isinstance(value, list) and len(value) == rows and not any(isinstance(v, (Tensor, Mapping)) for v in value):
        return [value[i] for i in index.tolist()]
    if isinstance(value, Mapping) or type(value) in (tuple, list) or hasattr(value, "_fields"):
        parts = value.values() if isinstance(value, Mapping) else value
        made = [taken(part, rows, index) for part in parts]
        if isinstance(value, Mapping):
            return dict(zip(value, made, strict=True))
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return mapped(value, some)


def row_bytes(value: Any, rows: int) -> list[bytes]:
    """Each row's numbers as bytes, over all tensors that have rows."""
    parts = []
    for t in tensors(value):
        axis = row_axis(t, rows)
        if axis is not None:
            flat = t.detach().cpu().movedim(axis, 0).reshape(rows, -1).contiguous()
            flat = flat.float() if flat.dtype == torch.bfloat16 else flat
            parts.append([r.tobytes() for r in flat.numpy()])
    return [b"".join(p) for p in zip(*parts, strict=True)] if parts else []

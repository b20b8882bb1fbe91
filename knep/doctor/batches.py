"""The batches that an examination keeps of a loader, checked to be what the doctor examines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from knep.errors import InputError

Batch = tuple[Tensor, Tensor]
_MOST_BYTES = 256 * 2**20


def held_back(seen: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(train, val): every tenth batch is for validation; every tenth image, where there is but one batch."""
    if len(seen) > 1:
        return [b for i, b in enumerate(seen) if i % 10], list(seen[::10])
    x, y = seen[0]
    held = torch.arange(len(y)) % 10 == 0
    return ([(x[~held], y[~held])], [(x[held], y[held])]) if len(y) > 1 else (list(seen), [])


def gathered(batches: Iterable[Any], most: int, padded: bool = False) -> list[Batch]:
    """At most so many batches and 256 MiB of a loader, which may be endless, checked to be (x, y).

    padded: labels of -1 mark what does not count, as knep's own loaders have it.
    """
    kept: list[Batch] = []
    room = _MOST_BYTES
    iterator = iter(batches)
    while len(kept) < most and room > 0:
        try:
            batch = next(iterator)
        except StopIteration:
            break
        except InputError:
            raise
        except Exception as error:  # a loader of another project may raise anything
            text = " ".join(str(error).split())
            raise InputError(f"batch {len(kept)} of the loader failed: {type(error).__name__}: {text}") from error
        x, y = checked(batch, len(kept))
        if padded and bool((y == -1).any()):
            x, y = x[y >= 0], y[y >= 0]
        room -= x.numel() * x.element_size()
        if len(y):
            kept.append((x, y))
    return kept


def checked(batch: Any, number: int) -> Batch:
    """(x, y) of a batch. Raises InputError for anything that is no images with class labels."""
    where = f"batch {number} of the loader"
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(isinstance(t, Tensor) for t in batch[:2]):
        raise InputError(f"{where} is {type(batch).__name__}, not (images, labels): let the loader give both")
    x, y = batch[0], batch[1]
    if x.is_complex() or x.layout != torch.strided or y.layout != torch.strided:
        raise InputError(f"{where} has {x.dtype} images of layout {x.layout}: give dense real ones")
    if y.is_floating_point() and y.ndim == 1 and bool((y == y.round()).all()):
        y = y.long()
    if y.ndim == 2 and y.shape[1] > 1:
        y = y.argmax(1)
    y = y.reshape(-1) if y.ndim == 2 else y
    if y.ndim != 1 or y.is_floating_point() or y.is_complex():
        raise InputError(f"{where} has labels {tuple(y.shape)} of {y.dtype}: the doctor examines classifiers, int (N,)")
    if len(x) != len(y):
        raise InputError(f"{where} has {len(x)} images and {len(y)} labels: there must be one for each")
    return x, y.long()


def reshuffles(train: Iterable[Any], seen: Sequence[Batch]) -> bool:
    """Whether a second look at the loader gives another first batch; an iterator cannot be looked at twice."""
    if iter(train) is train or isinstance(train, (list, tuple)):
        return False
    again = gathered(train, most=1)
    return not again or again[0][0].shape != seen[0][0].shape or not torch.equal(again[0][0], seen[0][0])

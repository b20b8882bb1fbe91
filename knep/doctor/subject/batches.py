"""The batches that an examination keeps of a loader, checked to be what the doctor examines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.errors import InputError

Batch = tuple[Tensor, Tensor]
_MOST_BYTES = 256 * 2**20
_ONE_CLASS = "the doctor examines classifiers with one class for each input, int64 (N,)"


@dataclass(frozen=True)
class Form:
    """How a loader gives class labels, for the loss to see what it sees in the user's loop.

    columns: None for indices (N,), 1 for indices (N, 1), K for rows (N, K) with a 1 at the class.
    """

    dtype: torch.dtype = torch.int64
    columns: int | None = None

    def of(self, y: Tensor) -> Tensor:
        """Class labels int64 (N,) as the loader gave them, to the bit."""
        if self.columns is None:
            return y.to(self.dtype)
        return (y[:, None] if self.columns == 1 else F.one_hot(y, self.columns)).to(self.dtype)

    def __str__(self) -> str:
        shape = "(N,)" if self.columns is None else f"(N, {self.columns})"
        return f"{str(self.dtype).removeprefix('torch.')} {shape}"


@dataclass(frozen=True)
class Labelled:
    """Batches (x, class labels int64 (N,)), and the form in which the loader gave the labels."""

    batches: list[Batch]
    form: Form = Form()


def held_back(seen: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(train, val): every tenth batch is for validation; every tenth image, where there is but one batch."""
    if len(seen) > 1:
        return [b for i, b in enumerate(seen) if i % 10], list(seen[::10])
    x, y = seen[0]
    held = torch.arange(len(y)) % 10 == 0
    return ([(x[~held], y[~held])], [(x[held], y[held])]) if len(y) > 1 else (list(seen), [])


def gathered(batches: Iterable[Any], most: int, padded: bool = False) -> Labelled:
    """At most so many batches and 256 MiB of a loader, which may be endless, checked to be (x, y).

    padded: labels of -1 mark what does not count, as knep's own loaders have it.
    """
    kept: list[Batch] = []
    form = None
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
        x, y, own = checked(batch, len(kept))
        if form not in (None, own):
            raise InputError(f"batch {len(kept)} of the loader has labels in another form than those before it: "
                             f"{own} after {form}")  # fmt: skip
        form = own
        if padded and bool((y == -1).any()):
            x, y = x[y >= 0], y[y >= 0]
        room -= x.numel() * x.element_size()
        if len(y):
            kept.append((x, y))
    return Labelled(kept, form or Form())


def checked(batch: Any, number: int) -> tuple[Tensor, Tensor, Form]:
    """(x, class labels int64 (N,), their form) of a batch. Raises InputError for what is no images with class labels,
    and `NoClasses` where it is the labels."""
    where = f"batch {number} of the loader"
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(isinstance(t, Tensor) for t in batch[:2]):
        raise InputError(f"{where} is {type(batch).__name__}, not (images, labels): let the loader give both")
    x, y = batch[0], batch[1]
    if not x.ndim or x.is_complex() or x.layout != torch.strided or y.layout != torch.strided:
        raise InputError(f"{where} has {x.dtype} images of layout {x.layout}: give dense real ones")
    if len(x) != (len(y) if y.ndim else 1):
        raise InputError(
            f"{where} has {len(x)} images and {len(y) if y.ndim else 1} labels: there must be one for each"
        )
    wrong = _no_classes(y)
    if wrong:
        raise NoClasses(f"{where} has labels {tuple(y.shape)} of {y.dtype}{wrong}: {_ONE_CLASS}", x, y)
    if y.ndim == 1:
        return x, y.long(), Form(y.dtype)
    return x, (y[:, 0].long() if y.shape[1] == 1 else y.long().argmax(1)), Form(y.dtype, y.shape[1])


class NoClasses(InputError):
    """Labels that name no class, with the batch that they are of."""

    def __init__(self, message: str, x: Tensor, y: Tensor) -> None:
        super().__init__(message)
        self.x, self.y = x, y


def _no_classes(y: Tensor) -> str:
    """What says that labels name no class, or ""."""
    if y.ndim not in (1, 2) or y.is_complex() or 0 in y.shape[1:]:
        return ", of no form of class labels"
    if y.ndim == 1 or y.shape[1] == 1:
        fraction = y.is_floating_point() and not bool(((y == y.round()) & (y >= 0)).all())
        return ", numbers to be fitted and not indices of classes" if fraction else ""
    if bool(((y != 0) & (y != 1)).any()):
        return ", rows that are not all 0 but for a 1 at the class"
    several = int((y.sum(1) != 1).sum())
    return f", of which {several} rows have several or no 1: several labels at once" if several else ""


def reshuffles(train: Iterable[Any], seen: Sequence[Batch]) -> bool:
    """Whether a second look at the loader gives another first batch; an iterator cannot be looked at twice."""
    if iter(train) is train or isinstance(train, (list, tuple)):
        return False
    again = gathered(train, most=1).batches
    return not again or again[0][0].shape != seen[0][0].shape or not torch.equal(again[0][0], seen[0][0])

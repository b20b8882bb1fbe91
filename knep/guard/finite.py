"""Passes over many tensors at once: whether all numbers are finite, and copies to go back to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from knep.optim.gradients import HALF


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every number of every tensor is finite; waits for the device, once.

    A sum is not finite where an addend is not, and on a CPU it is the cheapest pass there is. Sums that overflow are
    told from that by a second look.
    """
    if not tensors:
        return True
    if tensors[0].device.type == "cpu":
        total = 0.0
        for t in tensors:
            total += (t.sum(dtype=torch.float32) if t.dtype in HALF else t.sum()).item()
    else:
        total = float(torch.stack(torch._foreach_norm(list(tensors), 2, torch.float32)).sum())
    return math.isfinite(total) or all(bool(torch.isfinite(t).all()) for t in tensors)


def first_bad(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a number which is not finite."""
    return next((name for name, t in named if t.is_floating_point() and not bool(torch.isfinite(t).all())), None)


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, in hex, of names and bits: equal for tensors that are equal to the bit."""
    found = hashlib.sha256()
    for name, t in named:
        found.update(name.encode())
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def size(value: object) -> int:
    """Bytes of the tensors in nested plain data."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(size, items))


class Copies:
    """Copies of tensors to go back to, taken into the same memory again and again; nothing waits for the device."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._live = [t.detach() for t in tensors]
        self._kept = [t.clone() for t in self._live]

    def take(self) -> None:
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def restore(self) -> None:
        if self._live:
            torch._foreach_copy_(self._live, self._kept)

    @property
    def live(self) -> list[Tensor]:
        """The tensors themselves, seen without their graph."""
        return self._live

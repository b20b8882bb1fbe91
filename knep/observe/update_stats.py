"""What a step did to the parameters: their norms, their gradients' and that of the change, with one wait for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knep.optim.gradients import HALF


@dataclass
class UpdateStats:
    """What a step did to a parameter.

    Norms of its gradient (None without one) and of itself; update: ||dw|| / ||w||; stuck: of half precision, the share
    of its elements with gradient that the step left as they were; alike: all rows of the weight are equal, and all rows
    of its gradient.
    """

    path: str
    matrix: bool
    grad_norm: float | None = None
    weight_norm: float = 0.0
    update: float = 0.0
    stuck: float | None = None
    alike: bool = False

    def plain(self) -> dict[str, Any]:
        row = {"path": self.path, "weight_norm": self.weight_norm, "update": self.update}
        return row | ({} if self.grad_norm is None else {"grad_norm": self.grad_norm})


def read(numbers: Sequence[Tensor]) -> list[float]:
    """The values of 0-dim tensors, with one wait for the device."""
    if not numbers:
        return []
    place = numbers[0].device
    precise = torch.float64 if any(n.dtype == torch.float64 for n in numbers) else torch.float32
    return torch.stack([n.detach().to(place, precise) for n in numbers]).tolist()


def lengths(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Euclidean norms, 0-dim: squares of half precision overflow, so they are summed in float32."""
    tensors = list(tensors)
    if not tensors:
        return []
    if any(t.dtype == torch.float64 or t.is_complex() for t in tensors):
        return [torch.linalg.vector_norm(t) for t in tensors]
    return list(torch._foreach_norm(tensors, 2, torch.float32))


def dense(gradient: Tensor) -> Tensor:
    """The numbers of a gradient; of a sparse one those that it holds."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def weights_of(named: Mapping[str, Tensor], before: dict[str, Tensor], rows: bool) -> list[UpdateStats]:
    """The readings of parameters behind a step.

    before: copies from in front of it, of those whose step is measured; they are used up. rows: whether the rows of
    matrices are compared.
    """
    weights = {name: p.detach() for name, p in named.items()}
    arrived = {name: dense(p.grad.detach()) for name, p in named.items() if p.grad is not None}
    found = {name: UpdateStats(name, w.ndim > 1) for name, w in weights.items()}
    for name in [name for name, w in weights.items() if rows and w.ndim > 1]:
        found[name].alike = all(
            _alike(t) for t in (before.get(name, weights[name]), arrived.get(name)) if t is not None
        )
    norms = [lengths(group.values()) for group in (weights, arrived, before)]
    for name, copy in before.items():
        copy.sub_(weights[name])
    moved = lengths(before.values())
    pushed = {name: arrived[name] for name, t in before.items() if t.dtype in HALF and name in arrived}
    stuck = {name: _still(before[name], g) for name, g in pushed.items() if g.shape == before[name].shape}
    numbers = iter(read([n for group in (*norms, moved, list(stuck.values())) for n in group]))
    for name in weights:
        found[name].weight_norm = next(numbers)
    for name in arrived:
        found[name].grad_norm = next(numbers)
    old = {name: next(numbers) for name in before}
    for name, size in old.items():
        change = next(numbers)
        found[name].update = change / size if size else 0.0
    for name in stuck:
        share = next(numbers)
        found[name].stuck = share if found[name].grad_norm else None
    return list(found.values())


def _still(change: Tensor, gradient: Tensor) -> Tensor:
    """The share of elements with gradient that did not change, 0-dim; NaN where none has any."""
    pushed = gradient != 0
    return ((change == 0) & pushed).sum() / pushed.sum()


def _alike(t: Tensor) -> bool:
    """Whether the units of a layer (rows) are copies of each other; a single row has no copy."""
    return len(t) > 1 and bool((t[1:] == t[:1]).all())

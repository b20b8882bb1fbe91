"""What the checks share: a few rows of a subject with their output, and the loss on outputs that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from knep.doctor.subject.any_batch import first, taken
from knep.doctor.subject.any_task import Subject, scores
from knep.doctor.subject.rng_isolation import undisturbed

_ROWS = 12


@dataclass(frozen=True)
class Probe:
    """A few rows, passed once in eval mode.

    batch: at most 12 rows; rows: how many; model: a copy in eval mode.
    """

    subject: Subject
    batch: Any
    rows: int
    model: nn.Module

    @cached_property
    def output(self) -> Any:
        with torch.no_grad(), undisturbed(0):
            return self.subject.answer(self.model, self.batch)

    @cached_property
    def scores(self) -> Tensor:
        return scores(self.output).detach()

    @cached_property
    def inputs(self) -> Any:
        return self.subject.parts(self.batch)[0]

    @cached_property
    def x(self) -> Tensor | None:
        """The first input."""
        return first(self.inputs)

    @cached_property
    def target(self) -> Any:
        return self.subject.parts(self.batch)[1]

    @cached_property
    def y(self) -> Tensor | None:
        """The first target."""
        return first(self.target)

    @property
    def judged(self) -> bool:
        """Whether the loss can be asked about outputs that are made up: a function of one tensor and the target."""
        return isinstance(self.output, Tensor) and self.output.ndim > 0 and self.y is not None

    def loss(self, output: Tensor, y: Any = None) -> float:
        """The loss of an output for the batch's targets or others."""
        with torch.no_grad():
            return float(self.subject.value(output, self.target if y is None else y))

    def slope(self, output: Tensor, y: Any = None) -> Tensor:
        """The gradient of the loss with respect to the output."""
        leaf = output.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = self.subject.value(leaf, self.target if y is None else y)
        if not value.requires_grad:
            return torch.zeros_like(leaf)
        found = torch.autograd.grad(value, leaf, allow_unused=True)[0]
        return torch.zeros_like(leaf) if found is None else found

    def again(self, batch: Any) -> Tensor:
        """The scores of another batch of the same form."""
        with torch.no_grad(), undisturbed(0):
            return scores(self.subject.answer(self.model, batch)).detach()


def probe(subject: Subject, rows: int = _ROWS, which: int = 0) -> Probe:
    batch = subject.train[which]
    count = subject.rows(batch)
    index = torch.linspace(0, count - 1, min(rows, count)).round().long() if count else torch.zeros(0).long()
    few = taken(batch, count, index) if count else batch
    return Probe(subject, few, len(index), subject.copy())


@contextmanager
def functions(names: set[str]) -> Iterator[list[tuple[str, Any, Any, Any]]]:
    """(name, args, kwargs, result) of every call of these torch functions meanwhile."""
    from torch.overrides import TorchFunctionMode

    seen: list[tuple[str, Any, Any, Any]] = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") in names:
                seen.append((func.__name__, args, kwargs or {}, result))
            return result

    with Record():
        yield seen

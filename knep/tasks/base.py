"""A task knows a batch, a loss and what is counted; it knows no model and no trainer."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

Batch = tuple[Tensor, Tensor]
Reduction = Literal["mean", "sum", "none"]


class Augment(Protocol):
    """An option of the slot `augment`; see `knep.recipes.augment`."""

    epoch: int

    def __call__(self, x: Tensor, y: Tensor, num_classes: int) -> Batch: ...


class Counted(NamedTuple):
    """Of some rows: the sum of their losses and their right answers, 0-dim, and how many they are."""

    loss: Tensor
    correct: Tensor
    rows: Tensor | int


class Task(Protocol):
    """How a batch is read, what is minimised and what is counted."""

    def split(self, batch: Batch) -> Batch:
        """The model's input and the target."""
        ...

    def augmented(self, x: Tensor, target: Tensor, augment: Augment) -> Batch:
        """A training batch as `augment` changes it; mixing makes probabilities of the target."""
        ...

    def loss(self, output: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
        """What is minimised: 0-dim, or a number per row."""
        ...

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Which rows are answered rightly, bool."""
        ...

    def evaluated(self, output: Tensor, target: Tensor) -> Counted:
        """What is counted of a batch of evaluation; rows that only fill it up are left out."""
        ...


class Sums(Metric):
    """Mean loss and accuracy of an epoch so far, from sums on the device; adding never waits for it.

    `add` stands beside `update`, whose wrapper costs twice as much as the sums: 1.4 % of a small network's step.
    """

    full_state_update = False
    loss: Tensor
    correct: Tensor
    rows: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__(sync_on_compute=False)
        for name in Counted._fields:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self._whole = 0  # rows whose number is known without the device
        self.to(device)

    def add(self, counted: Counted) -> None:
        self.loss.add_(counted.loss)
        self.correct.add_(counted.correct)
        if isinstance(counted.rows, int):
            object.__setattr__(self, "_whole", self._whole + counted.rows)  # past nn.Module's slow one
        else:
            self.rows.add_(counted.rows)

    update = add

    def values(self) -> Tensor:
        """The three sums, float64 (3,)."""
        return torch.stack([self.loss, self.correct, self.rows + self._whole])

    def go_on(self, values: Tensor) -> None:
        """Adds the sums (3,) of an earlier life of the run."""
        self.add(Counted(*values.to(self.loss.device).unbind()))

    def compute(self) -> Tensor:
        """Mean loss and accuracy, float64 (2,)."""
        values = self.values()
        return values[:2] / values[2]

    def reset(self) -> None:
        super().reset()
        self._whole = 0

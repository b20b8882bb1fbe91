"""One class of several: cross-entropy, accuracy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.tasks.base import Batch, Common, Counted, Keys, Loss, Reduction, Target, Weighted, weighted_sum
from knep.tasks.metrics import Asked


class Classification(Common):
    """Scores (N, K) against labels int64 (N,), or against probabilities (N, K) after mixing. A label of -1 is padding.

    num_classes: K; smoothing: share of a target's probability that is spread over all classes (Szegedy et al. 2016,
    sec. 7), in training alone; loss, metrics, batch: as for `knep.tasks.base.Common`.
    """

    name: ClassVar[str] = "multiclass"
    counts_right: ClassVar[bool] = True
    family: ClassVar[str] = "Multiclass"

    def __init__(
        self,
        num_classes: int,
        smoothing: float = 0.0,
        *,
        loss: Loss | None = None,
        metrics: Asked = (),
        batch: Keys = None,
    ) -> None:
        super().__init__(num_classes, loss=loss, metrics=metrics, batch=batch, smoothing=smoothing)
        self.num_classes = num_classes
        # A loss of scores that no probabilities stand for: of several models that of their mean scores is told.
        self.of_scores = bool(getattr(loss, "of_scores", False))

    def split(self, batch: Any) -> Batch:
        """With labels of any whole dtype as int64, which losses ask for."""
        x, target = got = super().split(batch)
        if isinstance(target, Weighted):
            return x, Weighted(_classes(target.target), target.weight)
        classes = _classes(target)
        return got if classes is target else (x, classes)

    def loss(self, output: Tensor, target: Target, reduction: Reduction = "mean") -> Tensor:
        if self.function is None and not isinstance(target, Weighted):
            return F.cross_entropy(output, target, label_smoothing=self.smoothing, reduction=reduction)
        return super().loss(output, target, reduction)

    def _own(self, output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
        return F.cross_entropy(output, target, label_smoothing=smoothing, reduction=reduction)

    def counted(self, output: Tensor, target: Target, loss: Tensor) -> Counted:
        target = target.target if isinstance(target, Weighted) else target
        rows = output.shape[0]
        return Counted(loss * rows, self.right(output, target).sum(), rows)

    def right(self, output: Tensor, target: Tensor) -> Tensor:
        """Of a mixed image the likelier class is right."""
        return output.argmax(1) == (target if target.ndim == 1 else target.argmax(1))

    def evaluated(self, output: Tensor, target: Target) -> Counted:
        """The unsmoothed loss by the rows' weights, summed in float64."""
        weight = target.weight if isinstance(target, Weighted) else None
        target = target.target if isinstance(target, Weighted) else target
        if self.function is not None:
            loss = weighted_sum(self.function(output.double(), target, reduction="none"), weight)
        elif weight is None:
            loss = F.cross_entropy(output.double(), target, ignore_index=-1, reduction="sum")
        else:
            loss = weighted_sum(F.cross_entropy(output.double(), target, ignore_index=-1, reduction="none"), weight)
        rows: Tensor | int = len(target) if target.is_floating_point() else (target >= 0).sum()
        return Counted(loss, self.right(output, target).sum(), rows)

    def of_probabilities(self, log_p: Tensor, target: Target) -> Tensor:
        """The summed loss of log-probabilities (N, K), such as the mean of several models, by the rows' weights."""
        weight = target.weight if isinstance(target, Weighted) else None
        target = target.target if isinstance(target, Weighted) else target
        if self.function is not None:
            return weighted_sum(self.function(log_p.double(), target, reduction="none"), weight)
        if target.is_floating_point():
            return weighted_sum(-(target.to(log_p.dtype) * log_p).sum(1), weight)
        if weight is None:
            return F.nll_loss(log_p, target, reduction="sum")
        return weighted_sum(F.nll_loss(log_p, target, reduction="none"), weight)

    def _known(self, target: Tensor) -> Tensor | None:
        return None if target.is_floating_point() else target >= 0

    def answers(self, output: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Probabilities (M, K) and classes (M,), of probabilities the likelier."""
        output, target = self.real(output, target)
        return self.predictions(output.float()), target.argmax(1) if target.is_floating_point() else target.long()

    def predictions(self, output: Tensor) -> Tensor:
        """Probabilities (N, K)."""
        return output.softmax(1)

    def _instead(self, output: Tensor, target: Tensor) -> str | None:
        if target.shape == (len(target), 1):
            return "give them as (N,), y.squeeze(1)"
        if target.shape == output.shape and target.dtype not in (torch.bool, torch.uint8):
            return "give the place of the 1 in each row, y.argmax(1), or write task=multilabel"
        return None

    def _wants(self) -> str:
        return f"let the model give (N, {self.num_classes}), a score for each class, for targets int64 (N,)"

    def _fits(self, output: Tensor, target: Tensor) -> bool:
        if output.ndim != 2 or output.shape[1] != self.num_classes:
            return False
        if target.is_floating_point():  # mixed
            return target.shape == output.shape
        return target.shape == output.shape[:1]

    def _check_values(self, output: Tensor, target: Tensor) -> None:
        if not target.is_floating_point():
            self.check_classes(target, self.num_classes)


def _classes(target: Any) -> Any:
    whole = isinstance(target, Tensor) and target.dtype != torch.int64 and not target.is_floating_point()
    return target.long() if whole else target

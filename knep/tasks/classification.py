"""One class of several: cross-entropy, accuracy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from knep.tasks.base import Augment, Batch, Counted, Reduction


class Classification:
    """Scores (N, K) against labels int64 (N,), or against probabilities (N, K) after mixing. A label of -1 is padding.

    num_classes: K; smoothing: share of a target's probability that is spread over all classes (Szegedy et al. 2016,
    sec. 7), in training alone.
    """

    def __init__(self, num_classes: int, smoothing: float = 0.0) -> None:
        self.num_classes, self.smoothing = num_classes, smoothing

    def split(self, batch: Batch) -> Batch:
        return batch

    def augmented(self, x: Tensor, target: Tensor, augment: Augment) -> Batch:
        return augment(x, target, self.num_classes)

    def loss(self, output: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
        return F.cross_entropy(output, target, label_smoothing=self.smoothing, reduction=reduction)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Of a mixed image the likelier class is right."""
        return output.argmax(1) == (target if target.ndim == 1 else target.argmax(1))

    def evaluated(self, output: Tensor, target: Tensor) -> Counted:
        """The unsmoothed loss, summed in float64."""
        loss = F.cross_entropy(output.double(), target, ignore_index=-1, reduction="sum")
        return Counted(loss, self.correct(output, target).sum(), (target >= 0).sum())

    def of_probabilities(self, log_p: Tensor, target: Tensor) -> Tensor:
        """The summed loss of log-probabilities (N, K), such as the mean of several models."""
        return F.nll_loss(log_p, target, reduction="sum")

"""Yes or no: one score, binary cross-entropy, accuracy and the area under the ROC curve."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from knep.tasks.base import Augment, Batch, Common, Keys, Loss, Target
from knep.tasks.metrics import Asked


def _bce(output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
    smoothed = target * (1 - smoothing) + smoothing / 2 if smoothing else target
    return F.binary_cross_entropy_with_logits(output, smoothed, reduction=reduction)


class Binary(Common):
    """Scores (N,) or (N, 1) against targets (N,) or (N, 1) of 0 and 1, whole or float; above 0 means yes.

    loss, metrics, batch, smoothing: as for `knep.tasks.base.Common`.
    """

    name: ClassVar[str] = "binary"
    counts_right: ClassVar[bool] = True
    family: ClassVar[str] = "Binary"

    def __init__(
        self, *, loss: Loss | None = None, metrics: Asked = (), batch: Keys = None, smoothing: float = 0.0
    ) -> None:
        super().__init__(1, loss=loss, metrics=metrics, batch=batch, smoothing=smoothing)

    def _own(self, output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
        return _bce(output, target, reduction, smoothing)

    def augmented(self, x: Tensor, target: Target, augment: Augment) -> Batch:
        """Mixing makes a share of yes of two answers, where it would make classes of whole numbers."""
        return super().augmented(x, target.float() if isinstance(target, Tensor) else target, augment)

    def _aligned(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return output.reshape(-1), target.reshape(-1).to(output.dtype)

    def _known(self, target: Tensor) -> Tensor | None:
        flat = target.reshape(-1)
        return (flat == 0) | (flat == 1)

    def right(self, output: Tensor, target: Tensor) -> Tensor:
        return (output > 0) == (target > 0.5)

    def predictions(self, output: Tensor) -> Tensor:
        """Probabilities of yes (N,)."""
        return output.reshape(-1).sigmoid()

    def _wants(self) -> str:
        return "let the model give (N, 1), one score, for targets (N,) of 0 and 1, or write task=multiclass"

    def _fits(self, output: Tensor, target: Tensor) -> bool:
        return output.numel() == output.shape[0] == target.numel() == target.shape[0]

    def _check_values(self, output: Tensor, target: Tensor) -> None:
        self.check_yes_or_no(target)


class Multilabel(Common):
    """Scores (N, K) against targets (N, K) of 0 and 1, whole or float: each label by itself; above 0 means it holds.

    num_labels: K; loss, metrics, batch, smoothing: as for `knep.tasks.base.Common`.
    """

    name: ClassVar[str] = "multilabel"
    family: ClassVar[str] = "Multilabel"

    def __init__(
        self,
        num_labels: int,
        *,
        loss: Loss | None = None,
        metrics: Asked = (),
        batch: Keys = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_labels, loss=loss, metrics=metrics, batch=batch, smoothing=smoothing)

    def _own(self, output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
        return _bce(output, target, reduction, smoothing)

    def _aligned(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return output, target.to(output.dtype)

    def _known(self, target: Tensor) -> Tensor | None:
        return ((target == 0) | (target == 1)).all(1)

    def predictions(self, output: Tensor) -> Tensor:
        """Probability of each label (N, K)."""
        return output.sigmoid()

    def _wants(self) -> str:
        return f"let the model give (N, {self.outputs}), a score for each label, for targets (N, {self.outputs})"

    def _fits(self, output: Tensor, target: Tensor) -> bool:
        return output.shape == target.shape and output.ndim == 2 and output.shape[1] == self.outputs

    def _check_values(self, output: Tensor, target: Tensor) -> None:
        self.check_yes_or_no(target)

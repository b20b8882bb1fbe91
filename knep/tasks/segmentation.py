"""A class for each pixel: cross-entropy, intersection over union."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from knep.tasks.base import Common, Keys, Loss, Target
from knep.tasks.metrics import Asked


class Segmentation(Common):
    """Scores (N, K, H, W) against masks int64 (N, H, W); negative values and `ignore_index` are left out.

    num_classes: K; ignore_index: of pixels that nobody labelled, 255 as in Everingham et al. 2010;
    loss, metrics, batch, smoothing: as for `knep.tasks.base.Common`.
    """

    name: ClassVar[str] = "segmentation"
    family: ClassVar[str] = "Multiclass"

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        loss: Loss | None = None,
        metrics: Asked = (),
        batch: Keys = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, loss=loss, metrics=metrics, batch=batch, smoothing=smoothing)
        self.ignore_index = ignore_index

    def _own(self, output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
        return cross_entropy_of_known(output, target, reduction, smoothing)

    def _aligned(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        target = target.long()
        return output, target.where((target != self.ignore_index) & (target >= 0), -1)

    def _known(self, target: Tensor) -> Tensor | None:
        return (target >= 0).flatten(1).any(1)

    def predictions(self, output: Tensor) -> Tensor:
        """Probabilities (N, K, H, W)."""
        return output.softmax(1)

    def answers(self, output: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Of known pixels alone: probabilities (M, K) and classes (M,)."""
        return of_known(*self.real(output, target))

    def _wants(self) -> str:
        return (
            f"let the model give (N, {self.outputs}, H, W), a score for each class of each pixel, for masks int64 "
            "(N, H, W) of the same size"
        )

    def _fits(self, output: Tensor, target: Tensor) -> bool:
        shape = (output.shape[0], *output.shape[2:])
        whole = not target.is_floating_point()
        return output.ndim == 4 and output.shape[1] == self.outputs and target.shape == shape and whole

    def _check_values(self, output: Tensor, target: Tensor) -> None:
        self.check_classes(self._aligned(output, target)[1], self.outputs)


def cross_entropy_of_known(output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
    """Of scores (N, K, ...) and targets (N, ...), -1 where they are left out; a batch without any known has loss 0."""
    values = F.cross_entropy(output, target, ignore_index=-1, label_smoothing=smoothing, reduction="none")
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / (target >= 0).sum().clamp_min(1)


def of_known(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (M, K) and classes (M,) of what is not left out, from scores (N, K, ...) and targets (N, ...)."""
    known = target >= 0
    return output.float().movedim(1, -1)[known].softmax(1), target[known]

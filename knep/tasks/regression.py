"""Numbers to predict: standardised where they are learned, in their own unit where they are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knep.errors import InputError
from knep.tasks.base import Common, Keys, Loss, Target, Weighted
from knep.tasks.metrics import Asked


class Regression(Common, nn.Module):
    """Outputs (N,) or (N, T) against targets (N,) or (N, T).

    The loss is that of (target - mean) / std, which models learn at the same rates whatever the unit (LeCun et al.
    1998, sec. 4.3); `predictions` and metrics are in the targets' unit. Both numbers travel in checkpoints.

    num_targets: T; mean, std: of each target over the training split, for example by `fit`; 0 and 1 without them.
    loss, metrics, batch: as for `knep.tasks.base.Common`.
    """

    name: ClassVar[str] = "regression"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_targets: int = 1,
        *,
        mean: float | Sequence[float] | Tensor | None = None,
        std: float | Sequence[float] | Tensor | None = None,
        loss: Loss | None = None,
        metrics: Asked = (),
        batch: Keys = None,
    ) -> None:
        nn.Module.__init__(self)
        Common.__init__(self, num_targets, loss=loss, metrics=metrics, batch=batch)
        self.fitted = mean is not None or std is not None
        for name, given, plain in (("mean", mean, 0.0), ("std", std, 1.0)):
            value = torch.as_tensor(plain if given is None else given, dtype=torch.float32)
            if value.numel() not in (1, num_targets) or not value.isfinite().all():
                raise InputError(f"{name}={given} must be a finite number for each of the {num_targets} targets")
            self.register_buffer(name, value.reshape(-1).expand(num_targets).clone())
        if (self.std <= 0).any():
            raise InputError(f"std={std} must be above 0 for each target")

    def fit(self, targets: Iterable[Tensor]) -> None:
        """Takes mean and standard deviation from the training split's targets, in batches (N,) or (N, T).

        One that is constant is shifted only. Raises InputError where there is none, or one that is not finite.
        """
        odd = rows = 0
        count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        first: Tensor | None = None
        for batch in targets:
            y = batch.double().cpu().reshape(len(batch), -1)
            odd, rows = odd + int((~y.isfinite()).any(1).sum()), rows + len(y)
            if y.shape[1] != self.outputs:
                raise InputError(f"targets have {y.shape[1]} numbers a row: write num_targets={y.shape[1]}")
            first = y[:1] if first is None else first  # far from 0 the squares would lose their digits
            count, total = count + len(y), total + (y - first).sum(0)
            squares = squares + (y - first).square().sum(0)
        if odd:
            raise InputError(
                f"task=regression: {odd:,} of {rows:,} targets of the training split are not finite: leave those rows "
                "out"
            )
        if not count or first is None or not (total.isfinite().all() and squares.isfinite().all()):
            raise InputError("task=regression: targets of the training split must be there, and finite")
        shift = total / count
        std = (squares / count - shift.square()).clamp_min(0).sqrt()
        self.mean.copy_((first[0] + shift).float())
        self.std.copy_(torch.where(std > 1e-7 * (1 + self.mean.cpu().abs()), std, torch.ones_like(std)).float())
        self.fitted = True

    def _own(self, output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
        return F.mse_loss(output, target, reduction=reduction)

    def _aligned(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T), standardised."""
        target = target.reshape(-1, self.outputs).to(self.mean.dtype)
        return output.reshape(-1, self.outputs), ((target - self.mean) / self.std).to(output.dtype)

    def _known(self, target: Tensor) -> Tensor | None:
        return ~target.reshape(len(target), -1).isnan().any(1)

    def predictions(self, output: Tensor) -> Tensor:
        """In the targets' unit, (N,) for one of them, else (N, T)."""
        found = output.reshape(-1, self.outputs).to(self.mean.dtype) * self.std + self.mean
        return found[:, 0] if self.outputs == 1 else found

    def answers(self, output: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        target = target.target if isinstance(target, Weighted) else target
        known = self._known(target)
        if known is not None and not known.all():
            output, target = output[known], target[known]
        found = self.predictions(output.float())
        return found, target.reshape(found.shape).to(found.dtype)

    def _wants(self) -> str:
        wide = "(N,) or (N, 1)" if self.outputs == 1 else f"(N, {self.outputs})"
        return f"let the model give {wide}, a number for each target"

    def _instead(self, output: Tensor, target: Tensor) -> str | None:
        if target.is_floating_point() or not self._fits(output, target.float()):
            return None
        return "give numbers as floats, y.float(), or, where they are classes, write task=multiclass"

    def _fits(self, output: Tensor, target: Tensor) -> bool:
        shapes = [(self.outputs,)] + ([()] if self.outputs == 1 else [])
        rows = output.shape[:1] == target.shape[:1]
        return rows and target.is_floating_point() and output.shape[1:] in shapes and target.shape[1:] in shapes

    def _check_values(self, output: Tensor, target: Tensor) -> None:
        if not target.isfinite().all():
            odd = int((~target.reshape(len(target), -1).isfinite()).any(1).sum())
            raise InputError(f"task=regression: {odd:,} of {len(target):,} targets are not finite: leave those out")

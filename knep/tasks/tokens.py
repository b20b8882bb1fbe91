"""A class for each token of a sequence: the next token, or a tag; cross-entropy, perplexity."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from knep.errors import InputError
from knep.tasks.base import Batch, Common, Keys, Loss, Target
from knep.tasks.metrics import Asked
from knep.tasks.segmentation import cross_entropy_of_known, of_known


class Tagging(Common):
    """Scores (N, L, K) against tags int64 (N, L); negative ones, such as -100, are left out.

    num_classes: K; loss, metrics, batch, smoothing: as for `knep.tasks.base.Common`.
    """

    name: ClassVar[str] = "tagging"
    family: ClassVar[str] = "Multiclass"

    def __init__(
        self,
        num_classes: int,
        *,
        loss: Loss | None = None,
        metrics: Asked = (),
        batch: Keys = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, loss=loss, metrics=metrics, batch=batch, smoothing=smoothing)

    def _own(self, output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
        return cross_entropy_of_known(output, target, reduction, smoothing)

    def _aligned(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K, L) and (N, L)."""
        return output.transpose(1, 2), target.long().clamp_min(-1)

    def _known(self, target: Tensor) -> Tensor | None:
        return (target >= 0).any(1)

    def predictions(self, output: Tensor) -> Tensor:
        """Probabilities (N, L, K)."""
        return output.softmax(2)

    def answers(self, output: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Of known tokens alone: probabilities (M, K) and classes (M,)."""
        return of_known(*self.real(output, target))

    def _wants(self) -> str:
        return f"let the model give (N, L, {self.outputs}), scores for each token, for targets int64 (N, L)"

    def _fits(self, output: Tensor, target: Tensor) -> bool:
        shape = output.shape[:2]
        whole = not target.is_floating_point()
        return output.ndim == 3 and output.shape[2] == self.outputs and target.shape == shape and whole

    def _check_values(self, output: Tensor, target: Tensor) -> None:
        self.check_classes(target, self.outputs)


class NextToken(Tagging):
    """Scores (N, L, V) against the tokens int64 (N, L) themselves: those at place l are for the token at l + 1.

    A batch may be the tokens alone. vocabulary: V; shift: False where targets are moved by one place already.
    loss, metrics, batch, smoothing: as for `knep.tasks.base.Common`.
    """

    name: ClassVar[str] = "tokens"

    def __init__(
        self,
        vocabulary: int,
        *,
        shift: bool = True,
        loss: Loss | None = None,
        metrics: Asked = (),
        batch: Keys = None,
        smoothing: float = 0.0,
    ) -> None:
        self.shift = shift
        super().__init__(vocabulary, loss=loss, metrics=metrics, batch=batch, smoothing=smoothing)

    def split(self, batch: Any) -> Batch:
        if isinstance(batch, Tensor) and self.keys is None:
            return batch, batch
        if isinstance(batch, dict) and self.keys is None and "input_ids" in batch and "labels" not in batch:
            return batch["input_ids"], batch["input_ids"]
        return super().split(batch)

    def _aligned(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.shift:
            output, target = output[:, :-1], target[:, 1:]
        return super()._aligned(output, target)

    def _check_values(self, output: Tensor, target: Tensor) -> None:
        super()._check_values(output, target)
        if self.shift and target.shape[1] < 2:
            raise InputError("task=tokens: sequences of one token have no next one: give longer ones")

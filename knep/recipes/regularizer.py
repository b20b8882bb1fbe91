"""The three places where a regularizer may act, each the identity until an option of the slot fills it."""

from collections.abc import Sequence

from torch import Tensor


class Regularizer:
    """Changes nothing; the base of every `regularization` option.

    label_smoothing: share of the target's probability that is spread over all classes, read by the loss.
    """

    label_smoothing: float = 0.0

    def penalty(self, params: Sequence[Tensor]) -> Tensor | float:
        """What is added to the loss, from the decayed parameters (`knep.optim.param_groups.decayed`); a 0-dim tensor or 0."""
        return 0.0

    def after_step(self, params: Sequence[Tensor], lr: float) -> None:
        """Edits the decayed parameters in place after the optimizer's step, which was taken with rate `lr`."""

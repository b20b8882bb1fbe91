"""Label smoothing for a loss of one's own."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.errors import InputError

_calls: Counter[float] = Counter()


class Smoothed:
    """`loss(output, target)` on targets of which a share epsilon is spread over all classes, while gradients are kept.

    Szegedy et al. 2016, sec. 7. A loss that takes `label_smoothing`, as `F.cross_entropy` does, is asked for it; to
    another one, targets of floats (several labels, 0 or 1 each) go as t (1 - epsilon) + epsilon / 2, and labels int64
    (N,) as probabilities (N, K). Under torch.no_grad, in validation, the loss is the plain one.

    epsilon: in [0, 1). Raises InputError outside it.
    """

    def __init__(self, loss: Callable[..., Tensor], epsilon: float = 0.1) -> None:
        if not 0 <= epsilon < 1:
            raise InputError(f"epsilon must be in [0, 1), got {epsilon}")
        self.loss, self.epsilon = loss, epsilon
        self._own = _takes_smoothing(loss)

    def __call__(self, output: Tensor, target: Tensor, **how: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.loss(output, target, **how)
        _calls[self.epsilon] += 1
        if isinstance(self.loss, torch.nn.CrossEntropyLoss):
            weight, ignored = self.loss.weight, self.loss.ignore_index
            own = {"weight": weight, "ignore_index": ignored, "reduction": self.loss.reduction} | how
            return F.cross_entropy(output, target, label_smoothing=self.epsilon, **own)
        if self._own:
            return self.loss(output, target, **{"label_smoothing": self.epsilon} | how)
        if target.is_floating_point():
            return self.loss(output, target * (1 - self.epsilon) + self.epsilon / 2, **how)
        spread = torch.full_like(output, self.epsilon / output.shape[1])
        spread.scatter_add_(1, target[:, None], torch.full_like(output[:, :1], 1 - self.epsilon))
        return self.loss(output, spread, **how)


def smoothing_calls(epsilon: float) -> int:
    """How often losses of this epsilon were taken in this process, to see that a fit takes one."""
    return _calls[epsilon]


def _takes_smoothing(loss: Callable[..., Tensor]) -> bool:
    try:
        return "label_smoothing" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False

"""`regularization`: penalties on weights or outputs. Objects with the three places of `Regularizer`.

They see the decayed parameters only: weights of linear layers and convolutions, no norms, biases or embeddings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from knep.utils.validation import check

__all__ = ["L1", "L2", "Elastic", "LabelSmoothing", "MaxNorm", "Regularizer", "WeightDecay"]


class Regularizer:
    """Changes nothing; the base of every `regularization` option.

    label_smoothing: share of the target's probability that is spread over all classes, read by the loss.
    """

    label_smoothing: float = 0.0

    def penalty(self, params: Sequence[Tensor]) -> Tensor | float:
        """What is added to the loss, from the decayed parameters of `optim.param_groups`; a 0-dim tensor or 0."""
        return 0.0

    def after_step(self, params: Sequence[Tensor], lr: float) -> None:
        """Edits the decayed parameters in place after the optimizer's step, which was taken with rate `lr`."""


def _absolute(params: Sequence[Tensor]) -> Tensor | float:
    return sum((p.abs().sum() for p in params), 0.0)


def _squares(params: Sequence[Tensor]) -> Tensor | float:
    return sum(((p.abs() if p.is_complex() else p).square().sum() for p in params), 0.0)


class L1(Regularizer):
    """Adds strength * sum |w| to the loss: pulls every weight to zero by the same amount (Tibshirani 1996).

    strength: loss per unit of weight, in [0, inf). Raises InputError outside it.
    """

    def __init__(self, *, strength: float = 1e-5) -> None:
        check("strength", strength, "[0, inf)")
        self.strength = strength

    def penalty(self, params: Sequence[Tensor]) -> Tensor | float:
        return self.strength * _absolute(params)


class L2(Regularizer):
    """Adds strength / 2 * sum w^2 to the loss: pulls a weight to zero in proportion to its size (Tikhonov; ridge).

    With the factor 1/2 the gradient is strength * w, which for plain SGD equals its `weight_decay=strength`.

    strength: loss per squared unit of weight, in [0, inf). Raises InputError outside it.
    """

    def __init__(self, *, strength: float = 1e-4) -> None:
        check("strength", strength, "[0, inf)")
        self.strength = strength

    def penalty(self, params: Sequence[Tensor]) -> Tensor | float:
        return self.strength / 2 * _squares(params)


class Elastic(Regularizer):
    """Adds l1 * sum |w| + l2 / 2 * sum w^2 to the loss (elastic net, Zou and Hastie 2005).

    l1, l2: in [0, inf). Raises InputError outside it.
    """

    def __init__(self, *, l1: float = 1e-5, l2: float = 1e-4) -> None:
        check("l1", l1, "[0, inf)")
        check("l2", l2, "[0, inf)")
        self.l1, self.l2 = l1, l2

    def penalty(self, params: Sequence[Tensor]) -> Tensor | float:
        return self.l1 * _absolute(params) + self.l2 / 2 * _squares(params)


class WeightDecay(Regularizer):
    """Shrinks weights after each step, past the optimizer's own arithmetic: w <- w (1 - lr strength).

    Decoupled weight decay, Loshchilov and Hutter 2019, algorithm 2; comes on top of the optimizer's `weight_decay`.

    strength: per unit of learning rate, in [0, inf). Raises InputError outside it.
    """

    def __init__(self, *, strength: float = 0.01) -> None:
        check("strength", strength, "[0, inf)")
        self.strength = strength

    def after_step(self, params: Sequence[Tensor], lr: float) -> None:
        if params:
            with torch.no_grad():
                torch._foreach_mul_(list(params), 1 - lr * self.strength)


class MaxNorm(Regularizer):
    """Scales back, after each step, the weights of any unit whose norm passed `limit`; the others stay as they are.

    Max-norm constraint, Srivastava et al. 2014, sec. 5.1. A unit is a row of a linear layer or a filter of a
    convolution (an input channel of a transposed one). Under weight normalization it bounds the direction vectors,
    which changes nothing that the network computes.

    limit: largest norm, in (0, inf). Raises InputError outside it.
    """

    def __init__(self, *, limit: float = 3.0) -> None:
        check("limit", limit, "(0, inf)")
        self.limit = limit

    def after_step(self, params: Sequence[Tensor], lr: float) -> None:
        with torch.no_grad():
            for p in params:
                norms = torch.linalg.vector_norm(p, dim=tuple(range(1, p.ndim)), keepdim=True)
                p.mul_((self.limit / norms).clamp(max=1.0))


class LabelSmoothing(Regularizer):
    """Spreads `epsilon` of the target's probability evenly over all classes (Szegedy et al. 2016, sec. 7).

    epsilon: share, in [0, 1). Raises InputError outside it.
    """

    def __init__(self, *, epsilon: float = 0.1) -> None:
        check("epsilon", epsilon, "[0, 1)")
        self.label_smoothing = epsilon

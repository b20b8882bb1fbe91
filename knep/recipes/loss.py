"""`loss`: what is minimised. `f(output, target, **hp) -> loss`, a number, or with reduction="none" one per element.

One class of K: output (N, K, ...) of any scores, target int64 (N, ...), where what is negative is left out. Labels of
which several may hold, or one of yes and no: output and target of one shape, target 0 or 1 as a float. Numbers: output
and target of one shape; `knep.tasks.regression` standardises both. The mean is over elements that are not left out.

class_weight: factors on the loss of an element by its class, (K,), or for labels (2,) or (2, K) of no and yes; "auto"
stands for N / (K n_k), by the counts n_k of the training split (King and Zeng 2001). Weights are not divided out of the
mean, so that a row's gradient does not depend on the others of its batch: balanced ones have mean 1 over the split.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.errors import InputError
from knep.utils.validation import check

__all__ = [
    "asymmetric",
    "auto",
    "bce",
    "cross_entropy",
    "dice",
    "focal",
    "huber",
    "logit_adjusted",
    "mae",
    "mse",
    "one_vs_all",
    "poly",
    "quantile",
]

Weight = Tensor | Sequence[float] | str | None


def auto() -> None:
    """The task's own loss: cross-entropy for classes, its binary form for labels, squared error for numbers."""


def cross_entropy(
    output: Tensor,
    target: Tensor,
    *,
    class_weight: Weight = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """-log p_y, p = softmax(output) (Good 1952); of probabilities q for a target, -sum_k q_k log p_k.

    label_smoothing: share of the target's probability that is spread over all classes, in [0, 1).
    """
    values = _cross_entropy(output, target, label_smoothing)
    if target.is_floating_point() and class_weight is not None:
        shares = target.movedim(1, -1) * _factors(class_weight, output, output.shape[1])
        return _reduced(values * shares.sum(-1), None, reduction)
    return _reduced(values * _of_class(class_weight, target, output), _known(target), reduction)


def focal(
    output: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    class_weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t: what is right by far hardly counts (Lin et al. 2017, eq. 5).

    p_t: probability given to the true class, or for labels to what is true of each.
    gamma: in [0, inf), 0 is cross-entropy; alpha: of a label that holds, 1 - alpha of one that does not, in [0, 1]; for
    one class of several write class_weight. Raises InputError outside.
    """
    check("gamma", gamma, "[0, inf)")
    if target.is_floating_point():
        values = _bce(output, target)
        if alpha is not None:
            check("alpha", alpha, "[0, 1]")
            class_weight = (1 - alpha, alpha)
    elif alpha is not None:
        raise InputError(f"alpha={alpha} is for labels that hold or not: write class_weight, a number for each class")
    else:
        values = _cross_entropy(output, target)
    # A row that is right beyond doubt would have an infinite slope for gamma below 1.
    values = (-torch.expm1(-values)).clamp_min(1e-12) ** gamma * values
    return _reduced(values * _of_class(class_weight, target, output), _known(target), reduction)


def asymmetric(
    output: Tensor,
    target: Tensor,
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 4.0,
    margin: float = 0.05,
    class_weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """-(1 - p)^gamma_+ log p of labels that hold, -p_m^gamma_- log(1 - p_m) of others, p_m = max(p - margin, 0).

    Ridnik et al. 2021, sec. 2: the many labels that do not hold, and are told so, count for nothing.
    gamma_positive, gamma_negative: in [0, inf); margin: in [0, 1). Raises InputError outside.
    """
    check("gamma_positive", gamma_positive, "[0, inf)")
    check("gamma_negative", gamma_negative, "[0, inf)")
    check("margin", margin, "[0, 1)")
    p = output.sigmoid()
    shifted = (p - margin).clamp_min(1e-8)  # the slope of a power below 1 is infinite at 0
    holds = (1 - p) ** gamma_positive * F.logsigmoid(output)
    not_so = shifted**gamma_negative * torch.log1p(-shifted.clamp_max(1 - 1e-7))
    values = -(target * holds + (1 - target) * not_so)
    return _reduced(values * _of_class(class_weight, target, output), None, reduction)


def poly(
    output: Tensor, target: Tensor, *, epsilon: float = 1.0, class_weight: Weight = None, reduction: str = "mean"
) -> Tensor:
    """-log p_t + epsilon (1 - p_t): cross-entropy with another first term of its series (Leng et al. 2022, eq. 6).

    epsilon: in [-1, inf), 0 is cross-entropy. Raises InputError outside.
    """
    check("epsilon", epsilon, "[-1, inf)")
    values = _bce(output, target) if target.is_floating_point() else _cross_entropy(output, target)
    values = values + epsilon * (1 - torch.exp(-values)) * _there(target, output)
    return _reduced(values * _of_class(class_weight, target, output), _known(target), reduction)


def logit_adjusted(
    output: Tensor,
    target: Tensor,
    *,
    tau: float = 1.0,
    counts: Sequence[float] | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of output + tau log pi, pi the classes' shares of the training split (Menon et al. 2021, eq. 10).

    Rare classes get the margin that balanced error asks for; what is predicted are the scores as they are.
    tau: in [0, inf), 0 is cross-entropy; counts: how often each class is there, (K,), which a run counts by itself.
    Raises InputError outside, and without counts.
    """
    check("tau", tau, "[0, inf)")
    if counts is None:
        raise InputError("logit_adjusted needs the counts of the classes: give counts, or the training split")
    counts = torch.as_tensor(counts, device=output.device)
    prior = (counts.to(output.dtype).clamp_min(1) / counts.sum()).log() * tau
    values = _cross_entropy(output + prior.view(-1, *[1] * (output.ndim - 2)), target)
    return _reduced(values, _known(target), reduction)


def bce(
    output: Tensor,
    target: Tensor,
    *,
    class_weight: Weight = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """-t log p - (1 - t) log(1 - p), p = sigmoid(output): each label by itself (Cox 1958).

    label_smoothing: t becomes t (1 - label_smoothing) + label_smoothing / 2, in [0, 1).
    """
    smoothed = target * (1 - label_smoothing) + label_smoothing / 2 if label_smoothing else target
    return _reduced(_bce(output, smoothed) * _of_class(class_weight, target, output), None, reduction)


def one_vs_all(
    output: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    target_threshold: float | None = None,
    sum_classes: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """bce of each class of one that holds: -sum_k t_k log p_k + (1 - t_k) log(1 - p_k), p = sigmoid(output).

    Beyer et al. 2020; Wightman et al. 2021, sec. 3: images that are mixed hold two classes, and each is asked for by
    itself. What is predicted is the highest score, as ever.
    output: (N, K); target: int64 (N,), or shares of mixed classes (N, K). label_smoothing: t becomes
    t (1 - label_smoothing) + label_smoothing / K, in [0, 1). target_threshold: t becomes 1 above it and 0 below.
    sum_classes: the loss of a row is the sum over classes instead of the mean.
    """
    known, count = _known(target), output.shape[1]
    t = target if known is None else F.one_hot(target.clamp_min(0), count).to(output.dtype)
    t = t * (1 - label_smoothing) + label_smoothing / count if label_smoothing else t
    if target_threshold is not None:
        check("target_threshold", target_threshold, "[0, 1)")
        t = (t > target_threshold).to(output.dtype)
    each = _bce(output, t)
    values = each.sum(1) if sum_classes else each.mean(1)
    return _reduced(values if known is None else values * known, known, reduction)


def mse(output: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """(output - target)^2: its minimum is the mean (Legendre 1805)."""
    return F.mse_loss(output, target, reduction=reduction)


def mae(output: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """|output - target|: its minimum is the median, which outliers hardly move (Laplace 1774)."""
    return F.l1_loss(output, target, reduction=reduction)


def huber(output: Tensor, target: Tensor, *, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    """e^2 / 2 for errors |e| up to delta, delta (|e| - delta / 2) beyond (Huber 1964).

    delta: in units of the target, standardised ones in a run, in (0, inf). Raises InputError outside.
    """
    check("delta", delta, "(0, inf)")
    return F.huber_loss(output, target, delta=delta, reduction=reduction)


def quantile(output: Tensor, target: Tensor, *, q: float = 0.5, reduction: str = "mean") -> Tensor:
    """max(q e, (q - 1) e), e = target - output: its minimum is the quantile q (Koenker and Bassett 1978).

    q: share of targets that should lie below the output, in (0, 1). Raises InputError outside.
    """
    check("q", q, "(0, 1)")
    error = target - output
    return _reduced(torch.maximum(q * error, (q - 1) * error), None, reduction)


def dice(output: Tensor, target: Tensor, *, smooth: float = 1.0, reduction: str = "mean") -> Tensor:
    """1 - (2 sum p g + smooth) / (sum p^2 + sum g^2 + smooth) over a mask's pixels, mean over classes: (N,).

    Milletari et al. 2016, sec. 3, with the smoothing term of its successors; p = softmax(output), g the true mask.
    output: (N, K, ...); target: int64 (N, ...). smooth: in pixels, in [0, inf). Raises InputError outside.
    """
    check("smooth", smooth, "[0, inf)")
    there = (target >= 0)[:, None]
    p = (output.softmax(1) * there).flatten(2)
    g = (F.one_hot(target.clamp_min(0), output.shape[1]).movedim(-1, 1) * there).flatten(2).to(p.dtype)
    overlap, size = (p * g).sum(2), p.square().sum(2) + g.square().sum(2)
    values = 1 - ((2 * overlap + smooth) / (size + smooth).clamp_min(1e-12)).mean(1)
    return _reduced(values, None, reduction)


def balanced_weights(counts: Tensor) -> Tensor:
    """N / (K n_k) for counts n_k of K classes along the first axis, (K, ...); 0 where a class is never there."""
    counts = counts.double()
    weights = counts.sum(0) / (len(counts) * counts)
    return torch.where(counts > 0, weights, 0.0).float()


class Bound:
    """A loss with values for some of its keywords, whose tensors follow the output to its device."""

    def __init__(self, function: Callable[..., Tensor], **values: Any) -> None:
        self.func, self._values, self._device = function, values, torch.device("cpu")

    @property
    def of_scores(self) -> bool:
        """Whether it is of scores that are no logarithms of one distribution over classes."""
        return self.func is one_vs_all

    def __call__(self, output: Tensor, target: Tensor, **more: Any) -> Tensor:
        if output.device != self._device:
            self._device = output.device
            self._values = {k: v.to(output.device) if isinstance(v, Tensor) else v for k, v in self._values.items()}
        return self.func(output, target, **self._values, **more)


def wants_counts(loss: Callable[..., Any] | None) -> bool:
    """Whether a loss, as a config makes it, needs the counts of the training split's classes."""
    if not isinstance(loss, functools.partial):
        return False
    named = loss.keywords.get("class_weight")
    return named == "auto" or (_takes_counts(loss.func) and loss.keywords.get("counts") is None)


def bound(loss: Callable[..., Any] | None, counts: Tensor | None = None) -> Callable[..., Any] | None:
    """A loss as a config makes it, with what it needs of the training split; None for the task's own.

    counts: of the classes (K,), or of no and yes for each label (2, K); asked for where `wants_counts` says so.
    Raises InputError where they are missing.
    """
    if loss is None or getattr(loss, "func", None) is auto:
        return None
    if not isinstance(loss, functools.partial):
        return loss
    values: dict[str, Any] = dict(loss.keywords)
    if wants_counts(loss):
        if counts is None:
            raise InputError(
                "loss counts the classes of the training split, which nobody gave: give images=<training batches>, or "
                "write loss.class_weight=[...], a number for each class"
            )
        if values.get("class_weight") == "auto":
            values["class_weight"] = balanced_weights(counts)
        if _takes_counts(loss.func):
            values["counts"] = counts
    if isinstance(values.get("class_weight"), (list, tuple)):
        values["class_weight"] = torch.tensor(values["class_weight"], dtype=torch.float32)
    return Bound(loss.func, **values)


def _takes_counts(function: Callable[..., Any]) -> bool:
    return "counts" in inspect.signature(function).parameters


def _cross_entropy(output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Of each element, 0 where its target is negative."""
    if target.is_floating_point():
        return F.cross_entropy(output, target, label_smoothing=smoothing, reduction="none")
    target = target.clamp_min(-1)
    return F.cross_entropy(output, target, ignore_index=-1, label_smoothing=smoothing, reduction="none")


def _bce(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none")


def _factors(weight: Tensor | Sequence[float] | str, output: Tensor, count: int) -> Tensor:
    if isinstance(weight, str):
        raise InputError(f"class_weight={weight} needs the counts of the training split: give numbers here")
    factors = torch.as_tensor(weight, device=output.device).to(output.dtype)
    if len(factors) != count:
        raise InputError(f"loss.class_weight has {len(factors)} numbers where {count} are needed, one for each class")
    return factors


def _of_class(weight: Weight, target: Tensor, output: Tensor) -> Tensor | float:
    """The factor on the loss of each element: by its class, or by whether the label holds."""
    if weight is None:
        return 1.0
    if not target.is_floating_point():
        return _factors(weight, output, output.shape[1])[target.clamp_min(0)]
    no, yes = _factors(weight, output, 2)
    return no + (yes - no) * target


def _there(target: Tensor, output: Tensor) -> Tensor | float:
    known = _known(target)
    return 1.0 if known is None else known.to(output.dtype)


def _known(target: Tensor) -> Tensor | None:
    """Which elements count, None for all."""
    return None if target.is_floating_point() else target >= 0


def _reduced(values: Tensor, known: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    return values.mean() if known is None else values.sum() / known.sum().clamp_min(1)

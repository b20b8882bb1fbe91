"""What a loss asks of an output, against what the model gives: squashed twice, over the wrong axis, out of reach."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from knep.doctor.checks.probe import Probe, functions
from knep.doctor.checks.targets import no_probabilities
from knep.doctor.findings import Finding, finding
from knep.doctor.subject.any_batch import row_axis
from knep.doctor.subject.any_task import scores
from knep.doctor.subject.rng_isolation import undisturbed

_VIEWS = ("View", "Squeeze", "Unsqueeze", "Reshape", "UnsafeView", "Select", "Permute", "Transpose", "T", "Slice",
          "Expand", "Clone", "Alias", "ToCopy")  # fmt: skip
# Node -> what values it can give.
_RANGES = {
    "Relu": (0.0, math.inf), "Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0), "Softplus": (0.0, math.inf),
    "Softmax": (0.0, 1.0), "Abs": (0.0, math.inf), "Exp": (0.0, math.inf), "Hardsigmoid": (0.0, 1.0),
    "LogSigmoid": (-math.inf, 0.0), "LogSoftmax": (-math.inf, 0.0), "Elu": (-1.0, math.inf), "Square": (0.0, math.inf),
    "Gelu": (-0.17, math.inf), "Silu": (-0.28, math.inf),
}  # fmt: skip
_CLASSES = ("multiclass", "segmentation", "tokens", "tagging")
_LABELS = ("binary", "multilabel")


def last_function(p: Probe) -> str:
    """The name of what makes the output, behind what only changes its shape."""
    with torch.enable_grad(), undisturbed(0):
        output = scores(p.subject.answer(p.model, p.batch))
    node: Any = output.grad_fn
    while node is not None and _name(node) in _VIEWS and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else _name(node)


def _name(node: Any) -> str:
    name = node.name().rstrip("0123456789").removesuffix("Backward").lstrip("_")
    return str(name)


def squashed(p: Probe) -> list[Finding]:
    """double_softmax, wrong_axis and missing_log_softmax."""
    if not p.judged or p.y is None:
        return []
    z, end = p.scores, last_function(p)
    if p.subject.task in _LABELS and end in ("Sigmoid", "Hardsigmoid", "Softmax") and _wants_logits(p):
        shown = f"the outputs lie between {float(z.min()):.2g} and {float(z.max()):.2g}, by {end.lower()}"
        return [finding("double_softmax", f"{shown}, and the loss squashes them again", 0.96)]
    if p.subject.task in _LABELS and end == "Softmax" and z.ndim == 2 and z.shape[1] == 1:
        text = "softmax over one score gives 1 for every row"
        return [finding("wrong_axis", text, 0.97, mend="end in sigmoid, or give scores to BCEWithLogitsLoss")]
    wrong = _wrong_axis(p, z, end) or _exclusive(p, z, end)
    if wrong:
        return wrong
    if p.subject.task in _CLASSES:
        return _class_scores(p, z, end)
    return []


def _exclusive(p: Probe, z: Tensor, end: str) -> list[Finding]:
    """wrong_axis where softmax makes labels share one, and rows have several or none of them."""
    y = p.y
    if p.subject.task != "multilabel" or end != "Softmax" or y is None or y.ndim != 2 or y.shape != z.shape:
        return []
    odd = float(((y > 0.5).sum(1) != 1).float().mean())
    if odd < 0.1 or float((z.double().sum(1) - 1).abs().max()) > 1e-3:
        return []
    text = f"softmax makes the {z.shape[1]} labels of a row sum to 1, and {odd:.0%} of the rows have several or none"
    return [finding("wrong_axis", text, 0.95, mend="end in sigmoid, or give scores to BCEWithLogitsLoss")]


def _class_scores(p: Probe, z: Tensor, end: str) -> list[Finding]:
    axis = p.subject.class_axis
    if axis is None or axis >= z.ndim or z.shape[axis] < 2:
        return []
    try:
        at, raised = p.loss(z), p.loss(z + 3.0)
    except Exception:  # a loss with its own demands
        return []
    if abs(at - raised) < 1e-3 * (1 + abs(at)):  # it applies softmax itself
        sums = z.sum(axis)
        if bool((z >= 0).all()) and bool((sums - 1).abs().max() < 1e-3) and end in ("Softmax", "Exp", "Div"):
            text = (
                f"the outputs along axis {axis} are at least 0 and sum to 1, and the loss applies softmax to them again"
            )
            return [finding("double_softmax", text, 0.97)]
        if end in ("Sigmoid", "Tanh", "Hardsigmoid"):
            text = (
                f"the scores end in {end.lower()}, between {float(z.min()):.2g} and {float(z.max()):.2g}, and the loss "
            )
            return [finding("double_softmax", f"{text}applies softmax to them: no class can be sure", 0.9)]
        return []
    if abs(at - raised - 3.0) < 1e-3 * (1 + abs(at)) or abs(at - raised - 3.0 * _counted(p)) < 1e-2 * abs(at - raised):
        log = float((z.exp().sum(axis) - 1).abs().max()) < 1e-3
        if not log:
            what = "probabilities" if bool((z >= 0).all()) and float((z.sum(axis) - 1).abs().max()) < 1e-3 else "scores"
            text = f"the loss takes log-probabilities, and the model gives {what} from {float(z.min()):.2g} to "
            text += f"{float(z.max()):.2g}: it falls without end as they grow"
            return [finding("missing_log_softmax", text, 0.96)]
    return []


def _counted(p: Probe) -> int:
    return p.y.numel() if p.y is not None else 1


def _wrong_axis(p: Probe, z: Tensor, end: str) -> list[Finding]:
    """Outputs that sum to 1 along an axis that is not the classes', and softmax within that goes over queries."""
    axis = p.subject.class_axis
    if p.subject.task == "multiclass":
        axis = 1
    names = {0: "the batch", **{a: f"axis {a}" for a in range(1, z.ndim)}}
    if axis is not None and end in ("Softmax", "LogSoftmax") and z.ndim > 1:
        own = z.double() if end == "Softmax" else z.double().exp()
        for a in range(z.ndim):
            if a != axis and z.shape[a] > 1 and bool((own.sum(a) - 1).abs().max() < 1e-3):
                text = f"the outputs {tuple(z.shape)} sum to 1 along {names[a]}, and the classes are along axis {axis}"
                return [
                    finding("wrong_axis", text, 0.97, mend=f"give softmax dim={axis}, or none before cross-entropy")
                ]
    with torch.no_grad(), undisturbed(0), functions({"softmax", "log_softmax"}) as calls:
        p.subject.answer(p.model, p.batch)
    for name, args, kwargs, result in calls:
        dim = kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], int) else None)
        if not isinstance(result, Tensor) or result.ndim < 2:
            continue
        dim = (0 if result.ndim in (0, 1, 3) else 1) if dim is None else dim % result.ndim
        if dim == 0 and result.shape[0] > 1 and result.shape[0] == p.rows and row_axis(result, p.rows) == 0:
            text = f"{name} of {tuple(result.shape)} goes over axis 0, the batch"
            return [finding("wrong_axis", text, 0.97, mend="give softmax dim=-1")]
        if result.ndim > 2 and dim == result.ndim - 2 and result.shape[-1] == result.shape[-2] > 1:
            text = f"{name} of {tuple(result.shape)} goes over axis {dim}, the queries: what a place gives sums to 1, "
            return [finding("wrong_axis", f"{text}not what it takes", 0.85, mend="give softmax dim=-1")]
    return []


def _wants_logits(p: Probe) -> bool:
    """Whether the loss goes on falling where the outputs leave [0, 1] on the right side."""
    y = p.y
    if y is None or y.numel() != p.scores.numel():
        return False
    right = y.reshape(p.scores.shape) > 0.5
    try:
        inside, beyond = (p.loss(torch.where(right, a, b).to(p.scores)) for a, b in ((1.0, 0.0), (8.0, -8.0)))
    except Exception:  # a loss of probabilities refuses others
        return False
    return inside > 0.05 and beyond < 0.3 * inside


def reach(p: Probe) -> list[Finding]:
    """unreachable_targets where the last function gives no value near many of the targets."""
    if not p.judged or p.y is None:
        return []
    end = last_function(p)
    if end not in _RANGES:
        return []
    low, high = _RANGES[end]
    if p.subject.task in _LABELS:
        one_sided = end in ("Relu", "Softplus", "Abs", "Exp", "Square") and _wants_logits(p)
        if not one_sided:
            return []
        text = f"the scores end in {end.lower()} and are at least 0: no label gets a probability below a half"
        return [finding("unreachable_targets", text, 0.95)]
    if p.subject.task != "regression" or end in ("Gelu", "Silu", "Elu"):
        return []
    seen = p.subject.stacked("train")
    if seen is None or p.y.numel() != p.scores.numel() or not _fits(p):
        return []
    y = seen[1].double()
    margin = 0.02 * float(y.std(correction=0)) + 1e-6
    beyond = float(((y < low - margin) | (y > high + margin)).double().mean())
    if beyond < 0.02:
        return []
    text = (
        f"the output ends in {end.lower()}, values from {low:g} to {high:g}, and {100 * beyond:.3g} % of the targets, "
    )
    text += f"which go from {float(y.min()):.3g} to {float(y.max()):.3g}, lie beyond"
    return [finding("unreachable_targets", text, 0.97 if beyond > 0.1 else 0.85)]


def _fits(p: Probe) -> bool:
    """Whether the loss is least where the output is the target."""
    y = p.y
    if y is None:
        return False
    same = y.reshape(p.scores.shape).to(p.scores)
    far = same + same.std(correction=0).clamp(min=1e-3)
    try:
        return p.loss(same) < p.loss(far)
    except Exception:  # a loss with its own demands
        return False


def inverted(p: Probe) -> list[Finding]:
    """inverted_loss where a perfect answer costs more than what the model gives at its start."""
    y, z = p.y, p.scores
    if not p.judged or y is None or no_probabilities(p) or p.subject.distances:
        return []
    try:
        if p.subject.task == "regression" and y.numel() == z.numel() and y.is_floating_point():
            perfect = y.reshape(z.shape).to(z)
            poor = perfect.flip(0) if p.rows > 2 else z
        elif p.subject.task in _LABELS and y.numel() == z.numel():
            sure = torch.where(y.reshape(z.shape) > 0.5, 1.0, 0.0).to(z)
            perfect, poor = 0.9 * sure + 0.05, 0.95 - 0.9 * sure
        elif p.subject.task == "multiclass" and z.ndim == 2 and y.ndim == 1 and int(y.min()) >= 0:
            sure = torch.nn.functional.one_hot(y.long(), z.shape[1]).to(z)
            perfect, poor = 0.9 * sure + 0.1 / z.shape[1], 0.9 * sure.roll(1, 1) + 0.1 / z.shape[1]
        else:
            return []
        best, worst = p.loss(perfect), p.loss(poor)
    except Exception:  # a loss with its own demands
        return []
    if not best > worst + 1e-3 * (abs(worst) + 1e-3):
        return []
    text = f"the loss is {best:.3g} where the output is the target, and {worst:.3g} where it is another row's"
    return [finding("inverted_loss", text, 0.97)]

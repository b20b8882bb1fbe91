"""Inputs and targets as numbers: not finite, all the same, of a size of their own, or one among the other."""

from __future__ import annotations

import torch
from torch import Tensor

from knep.doctor.checks.probe import Probe, functions
from knep.doctor.findings import Finding, finding
from knep.doctor.subject.any_batch import tensors
from knep.doctor.subject.any_task import Subject


def numbers(subject: Subject) -> list[Finding]:
    """non_finite_inputs, non_finite_targets, constant_inputs and constant_labels."""
    for number, batch in enumerate(subject.train):
        for what, part in zip(("inputs", "targets"), subject.parts(batch), strict=True):
            bad = [t for t in tensors(part) if t.is_floating_point() and not bool(t.isfinite().all())]
            if bad:
                rows = bad[0].flatten(1) if bad[0].ndim > 1 else bad[0][:, None]
                ill = int((~rows.isfinite()).any(1).sum())
                text = f"{ill} rows of batch {number} have {what} that are NaN or infinite"
                name = "non_finite_inputs" if what == "inputs" else "non_finite_targets"
                return [finding(name, text, 0.98)]
    seen = subject.stacked("train")
    if seen is None or len(seen[0]) < 8:
        return []
    found = []
    if subject.task != "other" and bool((seen[0] == seen[0][:1]).all()):
        found.append(finding("constant_inputs", f"all {len(seen[0])} inputs are equal", 0.97))
    if subject.task not in ("other", "tokens") and bool((seen[1] == seen[1].flatten()[0]).all()):
        found.append(finding("constant_labels", f"all targets are {float(seen[1].flatten()[0]):g}", 0.97))
    return found


def out_of_range(p: Probe) -> list[Finding]:
    """labels_out_of_range: class numbers that the output has no score for."""
    y, axis = p.y, p.subject.class_axis
    if axis is None or y is None or axis >= p.scores.ndim or p.subject.task == "multiclass":
        return []
    classes = p.scores.shape[axis]
    seen = p.subject.stacked("train")
    y = y if seen is None else seen[1]
    top = int(y.max())
    if top < classes or top == getattr(p.subject.loss, "ignore_index", -100):
        return []
    return [finding("labels_out_of_range", f"labels go to {top} where the model has {classes} scores", 0.97)]


def no_probabilities(p: Probe) -> list[Finding]:
    """labels_out_of_range: targets that binary cross-entropy takes for probabilities, and that are none."""
    with torch.no_grad(), functions({"binary_cross_entropy", "binary_cross_entropy_with_logits"}) as calls:
        p.subject.value(p.output, p.target)
    for _, args, kwargs, _ in calls:
        y = kwargs.get("target", args[1] if len(args) > 1 else None)
        if isinstance(y, Tensor) and (float(y.min()) < 0 or float(y.max()) > 1):
            text = f"binary cross-entropy takes targets in [0, 1], and these go from {float(y.min()):.3g} to "
            text += f"{float(y.max()):.3g}: it falls without end"
            mend = "give targets of 0 and 1, for -1 and 1 (y + 1) / 2"
            return [finding("labels_out_of_range", text, 0.98, mend=mend)]
    return []


def leaked_target(subject: Subject) -> list[Finding]:
    """leaked_target: a column of the inputs that is the target."""
    seen = subject.stacked("train")
    if seen is None or seen[0].ndim != 2 or seen[0].shape[1] < 3 or not seen[0].is_floating_point():
        return []
    x, y = seen[0].double(), seen[1].double().flatten(1) if seen[1].ndim > 1 else seen[1].double()[:, None]
    if y.shape[1] != 1 or len(x) < 50 or float(y.std(correction=0)) == 0:
        return []
    a, b = _standard(x), _standard(y)
    cosine = (a * b).mean(0)
    held = subject.stacked("val")
    column = int(cosine.abs().argmax())
    if float(cosine.abs()[column]) < 1 - 1e-6 or _linear(x, column):
        return []
    text = f"column {column} of the inputs is the target but for its scale (correlation {float(cosine[column]):.6f})"
    if held is not None and held[0].shape[1:] == seen[0].shape[1:]:
        own = (_standard(held[0].double()) * _standard(held[1].double().reshape(len(held[0]), -1)[:, :1])).mean(0)
        text += f", {float(own[column]):.3f} in validation"
    return [finding("leaked_target", text, 0.9)]


def _standard(t: Tensor) -> Tensor:
    return (t - t.mean(0)) / t.std(0, correction=0).clamp(min=1e-12)


def _linear(x: Tensor, column: int) -> bool:
    """Whether all other columns vanish, so that one column is all there is."""
    return bool((x.std(0, correction=0) < 1e-12).sum() >= x.shape[1] - 1)


def one_row_off(subject: Subject) -> list[Finding]:
    """unrelated_labels where the target of a row fits the row before or behind it far better than its own."""
    held = subject.stacked("val", 2000)
    if held is None or not held[0].is_floating_point() or len(held[0]) < 80:
        return []
    x = _standard(held[0].double().flatten(1))
    if x.shape[1] > 256 or x.shape[1] * 3 > len(x) or held[0].ndim > 2:
        return []
    y = held[1]
    if y.is_floating_point() and y.flatten(1).shape[1:] == (1,) if y.ndim > 1 else y.is_floating_point():
        wanted = _standard(y.double().reshape(-1, 1))
    elif not y.is_floating_point() and y.ndim == 1 and 1 < len(y.unique()) < 50:
        wanted = torch.nn.functional.one_hot(y.long() - y.long().min()).double()
        wanted = _standard(wanted)
    else:
        return []
    fits = {step: _explained(x, wanted.roll(-step, 0)) for step in (0, 1, -1)}
    best = max(fits, key=lambda s: fits[s])
    if best == 0 or fits[best] < 0.25 or fits[0] > 0.3 * fits[best] or _in_time(x):
        return []
    text = f"a linear fit explains {100 * fits[0]:.2g} % of the targets of validation, and "
    text += f"{100 * fits[best]:.2g} % if each "
    text += f"row is given the target {'after' if best > 0 else 'before'} its own: targets are off by one row"
    mend = "read inputs and targets in the same order, from the same first row"
    return [finding("unrelated_labels", text, 0.97, mend=mend)]


def _in_time(x: Tensor) -> bool:
    """Whether neighbouring rows are alike, as in a series."""
    return float((x[1:] * x[:-1]).mean(0).abs().median()) > 0.3


def _explained(x: Tensor, y: Tensor) -> float:
    """Share of the variance of y that a ridge fit on half of the rows explains in the other half."""
    half = len(x) // 2
    a, b = x[:half], y[:half]
    w = torch.linalg.solve(a.T @ a + 0.01 * half * torch.eye(a.shape[1], dtype=a.dtype), a.T @ b)
    left = (y[half:] - x[half:] @ w).square().mean()
    return 1 - float(left / y[half:].square().mean().clamp(min=1e-12))


def sorted_rows(subject: Subject) -> list[Finding]:
    """sorted_batches where the means of the batches differ far more than those of rows in random order."""
    if subject.task not in ("regression", "binary", "multilabel") or len(subject.train) < 4:
        return []
    x, parts = subject.parts(subject.train[0])[0], [subject.parts(b)[1] for b in subject.train]
    if (isinstance(x, Tensor) and x.ndim == 3) or not all(isinstance(y, Tensor) and y.ndim for y in parts):
        return []
    rows = [y.double().reshape(len(y), -1) for y in parts if len(y) == len(parts[0])]
    if len(rows) < 4 or len({r.shape[1] for r in rows}) > 1 or len(rows[0]) < 4:
        return []
    means, whole = torch.stack([r.mean(0) for r in rows]), torch.cat(rows)
    excess = means.var(0) / whole.var(0).clamp(min=1e-12) * len(rows[0])
    top = float(excess.max())
    if top < max(6.0, 0.25 * len(rows[0])):
        return []
    text = f"the means of the targets of {len(rows)} batches of {len(rows[0])} vary {top:.3g} "
    text += "times as much as those of rows "
    return [finding("sorted_batches", f"{text}in random order", 0.85)]

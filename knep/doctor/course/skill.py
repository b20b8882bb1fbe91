"""How much better than a constant an answer is, in [.., 1]: 0 for the best constant, 1 for a perfect answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from knep.doctor.subject.any_batch import first
from knep.doctor.subject.any_task import Subject, scores

_SEVERAL = 16  # targets of a row that each have a meaning of their own
_CLASSES = ("multiclass", "segmentation", "tokens", "tagging")


def stacked_answers(subject: Subject, model: nn.Module, batches: Sequence[Any]) -> tuple[Tensor | None, Tensor | None]:
    """(scores, targets) flattened: classes last and places first; None where they do not lie beside each other."""
    outs, ys, read = [], [], subject.read
    with torch.no_grad():
        for batch in batches:
            output, target = subject.answer(model, batch), subject.parts(batch)[1]
            z, y = scores(output), first(target)
            if read is not None:
                z, y = read(output, target)
            if y is None:
                return None, None
            if subject.task in _CLASSES:
                axis = subject.class_axis
                if axis is None or axis >= z.ndim:
                    return None, None
                z, y = z.movedim(axis, -1).reshape(-1, z.shape[axis]), y.reshape(-1)
                if len(z) != len(y):
                    return None, None
            elif z.numel() != y.numel():
                return None, None
            else:
                z = z.reshape(y.shape)
            outs.append(z.float())
            ys.append(y)
    return (torch.cat(outs), torch.cat(ys)) if outs else (None, None)


def skill(subject: Subject, z: Tensor | None, y: Tensor | None) -> float:
    """Of regression the share of variance explained; of labels the area under the ROC curve, twice and less one; of
    classes the accuracy above that of the most frequent one, as a share of what that leaves, or the mean recall above
    chance where it is more, as under a loss that weighs rare classes."""
    if z is None or y is None or not len(z):
        return 0.0
    if not bool(z.isfinite().all()):
        return -1.0
    if subject.task in _CLASSES:
        counted = (y >= 0) & (y < z.shape[1]) & (y != getattr(subject.loss, "ignore_index", -100))
        return of_guesses(z.argmax(1)[counted], y[counted].long())
    if subject.task in ("binary", "multilabel"):
        found = of_scores(z.reshape(len(z), -1), y.reshape(len(y), -1))
        return abs(found) if subject.distances else found
    return explained(z.reshape(len(z), -1), y.reshape(len(y), -1))


def of_guesses(guess: Tensor, y: Tensor) -> float:
    if not len(y):
        return 0.0
    most = float(y.bincount().max()) / len(y)
    right = float((guess == y).float().mean())
    counts = y.bincount()
    there = counts > 0
    recall = float((y[guess == y].bincount(minlength=len(counts))[there] / counts[there]).mean())
    kinds = int(there.sum())
    even = (recall - 1 / kinds) / (1 - 1 / kinds) if kinds > 1 else 0.0
    return max((right - most) / max(1 - most, 1e-6), even)


def of_scores(z: Tensor, y: Tensor) -> float:
    """Over columns with both labels, the mean of 2 AUC - 1."""
    from scipy.stats import rankdata

    found = []
    for k in range(y.shape[1]):
        yes = y[:, k] > 0.5
        n = int(yes.sum())
        if 0 < n < len(yes):
            rank = rankdata(z[:, k].double().numpy())[yes.numpy()]
            found.append(2 * (float(rank.sum()) - n * (n + 1) / 2) / (n * (len(yes) - n)) - 1)
    return sum(found) / len(found) if found else 0.0


def explained(z: Tensor, y: Tensor) -> float:
    """Of each target its own share, so that a small one counts as a large one does; of many, as of pixels, of all."""
    y, z = y.double(), z.double()
    if y.shape[1] > _SEVERAL:
        return float((1 - (z - y).square().sum() / (y - y.mean(0)).square().sum().clamp(min=1e-12)).clamp(min=-1))
    spread = (y - y.mean(0)).square().sum(0)
    kept = spread > 1e-12 * spread.max()
    if not bool(kept.any()):
        return 0.0
    return float((1 - (z - y).square().sum(0)[kept] / spread[kept]).clamp(min=-1).mean())

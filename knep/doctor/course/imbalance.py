"""Rare labels and classes that a training neglects, and whether weighing them mends that: a paired cure."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from knep.doctor.course.own_targets import places_alone
from knep.doctor.course.skill import stacked_answers
from knep.doctor.course.trial import Course, Remedy, train
from knep.doctor.findings import Finding, finding
from knep.doctor.subject.any_batch import first
from knep.doctor.subject.any_task import Subject, scores

_RARE, _MISSED, _MENDED = 0.06, 0.35, 0.3
_TELLS = 0.15  # of skill, mean recall above chance, that weighing brings where there is something to see
_RANKED = 0.3  # of 2 AUC - 1: what ranks positives first, and gives none of them, misses a threshold
_NEVER, _SELDOM = 0.03, 0.25  # recalled as good as never: harm enough where a class is merely seldom
_LONGER = 3  # times a trial, at most, that a run is followed to see whether it finds them yet


def neglected(subject: Subject, base: Course, steps: int) -> list[Finding]:
    """class_imbalance where a rare label is hardly ever recalled, and is with its loss weighed."""
    if base.diverged or base.model is None or not subject.val:
        return []
    if subject.task in ("binary", "multilabel") and base.reached < _RANKED:
        return []  # it does not tell them apart at all: another disease
    z, y = stacked_answers(subject, base.model, subject.val[:16])
    if z is None or y is None:
        return []
    rare, recall, shares = _recalls(subject, z, y)
    ill = [k for k in rare if recall[k] < _MISSED]
    longer = subject.epochs * subject.steps > steps
    whole = min(subject.epochs * subject.steps, _LONGER * steps)
    if ill and (base.falls or base.rises) and whole > steps:  # a run that goes on may find them yet
        steps, base = whole, train(subject, whole)
        if base.diverged or base.model is None:
            return []
        z, y = stacked_answers(subject, base.model, subject.val[:16])
        assert z is not None
        assert y is not None  # they were there before
        rare, recall, shares = _recalls(subject, z, y)
        ill = [k for k in rare if recall[k] < _MISSED]
    ranked = subject.task in ("binary", "multilabel")  # what ranks well and answers never is not about to find them
    goes_on = base.rises or (base.falls and longer and not ranked)
    if not ill or (goes_on and not (ranked and whole == subject.epochs * subject.steps)):
        return []
    weighed = train(subject, steps, Remedy(loss=_weighed(subject)))
    if weighed.diverged or weighed.model is None or weighed.reached < _TELLS:
        return []  # it answers with the rare class whatever it sees
    alone = places_alone(subject, weighed)
    if alone:
        return alone
    z, y = stacked_answers(subject, weighed.model, subject.val[:16])
    if z is None or y is None:
        return []
    after = _recalls(subject, z, y)[1]
    mended = [k for k in ill if after[k] > recall[k] + _MENDED]
    if not mended:
        return []
    k = mended[0]
    name = "positives" if subject.task == "binary" else f"label {k}" if subject.task == "multilabel" else f"class {k}"
    text = f"{name} make {shares[k]:.1%} of the targets; the trial recalls {recall[k]:.0%} of them, and "
    text += f"{after[k]:.0%} with each class weighed by how rare it is"
    way = "BCEWithLogitsLoss(pos_weight=negatives / positives)"
    if subject.task not in ("binary", "multilabel"):
        way = "CrossEntropyLoss(weight=1 / frequency)"
    mend = f"weigh the loss, {way}, draw rare rows more often, or move the threshold by log(frequency)"
    return [finding("class_imbalance", text, 0.82, mend=mend)]


def _recalls(subject: Subject, z: Tensor, y: Tensor) -> tuple[list[int], dict[int, float], dict[int, float]]:
    """(rare classes with at least 5 rows, recall by class, share by class)."""
    recall, shares = {}, {}
    if subject.task in ("binary", "multilabel"):
        z, y = z.reshape(len(z), -1), y.reshape(len(y), -1)
        cut = 0.5 if bool((z >= 0).all() and (z <= 1).all()) else 0.0
        for k in range(y.shape[1]):
            yes = y[:, k] > 0.5
            shares[k] = float(yes.float().mean())
            recall[k] = float((z[yes, k] > cut).float().mean()) if int(yes.sum()) >= 5 else 1.0
    elif subject.task in ("segmentation", "tagging"):
        guess = z.argmax(1)
        for k in range(z.shape[1]):
            own = y == k
            shares[k] = float(own.float().mean())
            recall[k] = float((guess[own] == k).float().mean()) if int(own.sum()) >= 20 else 1.0
    rare = [k for k, s in shares.items() if 0 < s < (_RARE if recall[k] >= _NEVER else _SELDOM)]
    return rare, recall, shares


def _weighed(subject: Subject) -> Any:
    seen = subject.stacked("train")
    y = seen[1] if seen is not None else first(subject.parts(subject.train[0])[1])
    assert y is not None  # answers were stacked
    if subject.task in ("binary", "multilabel"):
        rows = y.double().reshape(len(y), -1)
        share = rows.mean(0).clamp(1e-3, 1 - 1e-3)
        weight = ((1 - share) / share).float()
        return lambda output, target: F.binary_cross_entropy_with_logits(
            _logits(scores(output)).reshape(-1, len(weight)), first(target).float().reshape(-1, len(weight)),  # pyright: ignore
            pos_weight=weight,
        )  # fmt: skip
    axis = subject.class_axis or 1
    classes = subject.shapes[0].shape[axis]
    often = y[(y >= 0) & (y < classes)].long().bincount(minlength=classes).float()
    weight = (often.sum() / often.clamp(min=1) / classes).clamp(max=1000)
    return lambda output, target: F.cross_entropy(
        scores(output).movedim(axis, -1).flatten(0, -2),
        first(target).flatten().long(),  # pyright: ignore[reportOptionalMemberAccess]
        weight,
    )


def _logits(z: Tensor) -> Tensor:
    """Scores; probabilities are turned back into them."""
    inside = bool((z >= 0).all() and (z <= 1).all())
    return z.clamp(1e-6, 1 - 1e-6).logit() if inside else z

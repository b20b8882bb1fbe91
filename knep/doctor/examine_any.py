"""The examination of any model, data and loss: checks first, then the trial of its task.

Of classes for inputs one by one with cross-entropy it is the one of images (`diagnose`); of all else `course`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch import Tensor

from knep.doctor.checks.examine import checked
from knep.doctor.checks.probe import probe
from knep.doctor.course.examine import course_findings, scale_at_fault
from knep.doctor.credible import credible
from knep.doctor.diagnose import diagnose
from knep.doctor.findings import Report, ordered
from knep.doctor.subject.any_task import Subject
from knep.doctor.subject.rng_isolation import undisturbed
from knep.doctor.subject.setup import of
from knep.recipes import clip as clips

# What no worse explanation is wanted beside.
_EXPLAINS = 0.8


def examine_any(
    subject: Subject,
    told: Callable[[str], None] | None = None,
    *,
    num_classes: int | None = None,
    clip: Callable[[Iterable[Tensor]], Tensor] | None = None,
) -> Report:
    """Examines a subject; num_classes, clip: what the examination of classes takes beside.

    Raises InputError for a model or a loss that fails on its data.
    """
    with undisturbed(subject.seed, *subject.loaders):
        return _examined(subject, told or (lambda _: None), num_classes, clip or clips.none)


def _examined(
    subject: Subject, tell: Callable[[str], None], num_classes: int | None, clip: Callable[[Iterable[Tensor]], Tensor]
) -> Report:
    began = time.perf_counter()
    images = of_classes(subject)
    tell("checks")
    found, notes = checked(subject, images)
    found = scale_at_fault(subject, found)
    if any(f.certain and f.gravity >= _EXPLAINS for f in found):
        return Report(ordered(found), {"task": subject.task}, time.perf_counter() - began, tuple(notes))
    if images:
        model, (train, val) = subject.model, subject.loaders
        patient = of(
            model,
            train,
            val,
            optimizer=subject.make_optimizer,
            loss=subject.loss,
            num_classes=num_classes,
            epochs=subject.epochs,
            clip=clip,
            seed=subject.seed,
        )
        report = diagnose(patient, told=tell)
        held = credible(subject, report)
        found += held
        notes += report.notes
        measured = report.measured
        if "trial" not in measured and report.findings and not held:  # it stopped for what does not hold
            found += course_findings(subject)[0]
    else:
        tell("trial")
        more, measured = course_findings(subject)
        found += more
    return Report(ordered(found), measured, time.perf_counter() - began, tuple(notes))


def of_classes(subject: Subject) -> bool:
    """Whether the examination of images takes it: (x, class of each) with scores (N, K)."""
    batch = subject.train[0]
    if subject.run_forward is not None or subject.asked not in (None, "multiclass"):
        return False
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        return False
    x, y = batch
    output = subject.answered(subject.copy(), subject.some(batch, 4))
    if not isinstance(output, Tensor) or output.ndim != 2 or len(x) != len(y):
        return False
    return subject.task == "multiclass" or (output.shape[1] > 2 and _one_hot(y) and _of_classes(subject))


def _one_hot(y: Tensor) -> bool:
    return y.ndim == 2 and bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())


def _of_classes(subject: Subject) -> bool:
    """Whether the loss is blind to a constant added to all scores of a row, as cross-entropy is."""
    p = probe(subject)
    try:
        at, raised = (p.loss(p.scores + c) for c in (0.0, 3.0))
    except Exception:  # a loss with its own demands
        return subject.loss is None
    return abs(at - raised) < 1e-3 * (1 + abs(at)) or subject.loss is None

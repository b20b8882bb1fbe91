"""What a trial has learned of the rows' own targets: its loss with them, beside that with the targets of other rows."""

from __future__ import annotations

import torch

from knep.doctor.course.trial import Course
from knep.doctor.findings import Finding, finding
from knep.doctor.subject.any_batch import first, taken
from knep.doctor.subject.any_task import Subject
from knep.utils.rng import generator


def turned(subject: Subject, base: Course) -> list[Finding]:
    """inverted_loss where after training the loss of the rows with their own targets is above that with others'."""
    if base.model is None or base.diverged or subject.task == "other" or not subject.val:
        return []
    if base.losses[-1] < -30 * (1 + abs(base.losses[0])):
        text = f"in a trial the loss went from {base.losses[0]:.3g} to {base.losses[-1]:.3g}: it falls without end"
        return [finding("inverted_loss", text, 0.85)]
    own = other = 0.0
    with torch.no_grad():
        for batch in (*subject.train[:6], *subject.val[:6]):
            rows, output = subject.rows(batch), subject.answer(base.model, batch)
            target = subject.parts(batch)[1]
            own += float(subject.value(output, target))
            other += float(subject.value(output, taken(target, rows, torch.arange(rows).roll(1))))
    if not own > other + 0.1 * abs(other) + 1e-3:
        return []
    text = f"after a trial the loss is {own / 12:.3g} with the rows' own targets and "
    text += f"{other / 12:.3g} with those of other rows"
    return [finding("inverted_loss", text, 0.95)]


def places_alone(subject: Subject, base: Course) -> list[Finding]:
    """unrelated_labels where a trial learned, and answers for others' targets as well as for the rows' own: it knows
    where in a picture or a sequence a class usually is, and nothing of what is there."""
    places = subject.task in ("segmentation", "tagging", "binary", "regression")
    if base.model is None or base.diverged or not places or base.reached < 0.1 or not subject.val:
        return []
    own = other = differ = 0.0
    with torch.no_grad():
        for count, batch in enumerate((*subject.train[:6], *subject.val[:6])):
            rows, target = subject.rows(batch), subject.parts(batch)[1]
            y = first(target)
            if y is None or y.ndim < 2 or y[0].numel() < 4 or rows < 4:
                return []
            index = torch.randperm(rows, generator=generator(subject.seed, count))
            strange, output = taken(target, rows, index), subject.answer(base.model, batch)
            own += float(subject.value(output, target))
            other += float(subject.value(output, strange))
            differ += float((first(strange) != y).float().mean()) / 12
    if differ < 0.05 or own < other - 0.05 * abs(other):
        return []
    text = (
        f"after a trial the loss is {own / 12:.3g} with the rows' own targets and {other / 12:.3g} with those of other "
    )
    text += "rows: only where a class usually is was learned"
    return [finding("unrelated_labels", text, 0.93)]

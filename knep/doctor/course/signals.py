"""The passes made of an image classifier, of another task: each row's target goes by its number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knep.doctor.findings import Finding
from knep.doctor.model.batch_norm import batch_norms
from knep.doctor.model.examine import passing, stepped
from knep.doctor.model.gradient_flow import cut_off, frozen
from knep.doctor.model.rectified import rectified
from knep.doctor.model.signal_pass import signals
from knep.doctor.model.symmetry import symmetric
from knep.doctor.model.unregistered import unregistered
from knep.doctor.subject.any_batch import mapped, row_axis
from knep.doctor.subject.any_task import Subject, scores
from knep.doctor.subject.setup import Patient

_ROWS = 512


@dataclass(frozen=True)
class _Numbered(Patient):
    """A patient whose labels are row numbers, by which the subject's own loss finds its targets."""

    subject: Any = None
    target: Any = None
    trail: tuple[int, ...] = field(default=())

    @property
    def of_classes(self) -> bool:
        return self.subject.task == "multiclass"

    def criterion(self, scores: Tensor, y: Tensor) -> Tensor:
        rows = len(self.train[0][1])
        own = mapped(self.target, lambda t: t[y] if row_axis(t, rows) == 0 else t)
        return self.subject.value(scores.reshape(len(scores), *self.trail), own)


def model_signals(subject: Subject) -> list[Finding]:
    """What signals and settings of the layers show; nothing for models of several inputs or outputs."""
    patient = _numbered(subject)
    if patient is None:
        return []
    seen = signals(patient)
    if not seen.reached:
        return []
    after = stepped(patient)
    later = signals(patient, after)
    return [
        *cut_off(patient, seen, later),
        *rectified(patient, seen),
        *unregistered(patient),
        *frozen(patient.model, seen),
        *symmetric(patient.model, after, seen),
        *batch_norms(patient, seen),
        *passing(patient, seen, later, after),
    ]


def _numbered(subject: Subject) -> _Numbered | None:
    if subject.run_forward is not None or subject.task == "other":
        return None
    parts = [subject.parts(b) for b in subject.train[: max(1, _ROWS // max(1, subject.rows(subject.train[0])))]]
    if not all(isinstance(t, Tensor) and t.ndim for pair in parts for t in pair):
        return None
    if any(len({t.shape[1:] for t in column}) > 1 for column in zip(*parts, strict=True)):
        return None
    x, y = (torch.cat([pair[i] for pair in parts]) for i in (0, 1))
    output = subject.answer(subject.copy(), subject.some(subject.train[0], 4))
    if not isinstance(output, Tensor) or output.ndim < 1 or len(x) != len(y) or row_axis(output, 4) != 0:
        return None
    model = subject.copy()
    model.register_forward_hook(_flat)
    return _Numbered(
        model=model,
        train=[(x, torch.arange(len(x)))],
        val=[],
        num_classes=len(x),
        make_optimizer=subject.make_optimizer,
        batches=subject.steps,
        epochs=subject.epochs,
        images=len(x),
        subject=subject,
        target=y,
        trail=tuple(output.shape[1:]),
    )


def _flat(model: nn.Module, args: Any, output: Any) -> Tensor:
    z = scores(output)
    return z[:, None] if z.ndim == 1 else z.flatten(1)

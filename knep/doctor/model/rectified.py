"""Scores that pass a rectifier, and the same model without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from knep.doctor.findings import Finding, finding
from knep.doctor.model.output_layer import applies_softmax
from knep.doctor.subject.copies import copied
from knep.doctor.subject.setup import Patient
from knep.observe.rows import Signals
from knep.surgery.record import Recorder, name_of, surround

_RELUS = ("relu", "relu6", "threshold")


def rectified(patient: Patient, seen: Signals) -> list[Finding]:
    """dying_relu where the scores themselves pass a rectifier: a class that is cut off there gets no gradient.

    Maps of scores that are rectified and then averaged (SqueezeNet) are another thing.
    """
    scores = seen.scores
    if scores.last not in _RELUS or not scores.flat or not applies_softmax(patient):
        return []
    text = f"the scores themselves pass {scores.last}: a class below 0 gets no gradient and cannot come back"
    mend = "let the model return scores, without the last rectifier"
    return [finding("dying_relu", text, 0.9, certain=False, mend=mend)]


def unrectified(patient: Patient) -> Patient:
    """The model's output as it was before a rectifier that made it."""
    model = copied(patient.model)
    surround(model, _Last)
    return replace(patient, model=model)


class _Last(Recorder):
    """given, made: what the last rectifier was given and made of it."""

    given: Tensor | None = None
    made: Tensor | None = None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.given if output is self.made else output

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name_of(func).rstrip("_") not in (*_RELUS, "hardtanh", "clamp", "clamp_min"):
            return func(*args, **kwargs)
        self.given = args[0]
        if name_of(func) == "relu_":  # would overwrite what it is given
            self.made = torch.relu(args[0])
        else:
            self.made = func(args[0].clone(), *args[1:], **kwargs)
        return self.made

"""Where a network ends in probabilities, and where it is too narrow for its classes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from knep.doctor.findings import Finding, finding
from knep.doctor.model.signal_pass import chosen, isolated, like, widened
from knep.doctor.subject.setup import Patient
from knep.observe.rows import Signals
from knep.surgery.record import hooked

_SHIFT = 3.0


def double_softmax(patient: Patient, seen: Signals) -> list[Finding]:
    """double_softmax where the scores are probabilities, or end in a sigmoid, and the loss applies softmax."""
    end, last = seen.scores.ends, seen.scores.last
    if end not in ("probabilities", "unit interval") or seen.scores.chance == 0 or not applies_softmax(patient):
        return []
    if end == "probabilities":
        along = "of each image" if seen.scores.axis == 1 else "over the batch, along the wrong axis,"
        text = f"the model's outputs {along} are at least 0 and sum to 1"
        gravity, certain = 0.97, True
    else:
        text = f"all of the model's outputs lie between 0 and 1, mean {seen.scores.mean:.3g}"
        certain = last in ("sigmoid", "softmax")
        gravity = 0.95 if certain else 0.4
    by = f", by {last}" if last in ("softmax", "sigmoid") else ""
    return [finding("double_softmax", f"{text}{by}, and the loss applies softmax to them", gravity, certain=certain)]


def applies_softmax(patient: Patient) -> bool:
    """Whether the loss takes scores, which softmax makes blind to a constant added to all of an image's."""
    classes = patient.num_classes
    z = torch.linspace(0.1, 0.9, 4 * classes, device=patient.device).reshape(4, classes).roll(1, 1)
    y = torch.arange(4, device=z.device) % classes
    at, moved = (float(patient.criterion(s, y)) for s in (z, z + _SHIFT))
    return abs(at - moved) < 1e-3 * (1 + abs(at))


def narrow(patient: Patient, seen: Signals) -> list[Finding]:
    """too_little_capacity where everything passes through fewer numbers than half the classes."""
    rows = seen.linear
    if len(rows) < 2 or patient.num_classes < 4:
        return []
    tight = min(rows[:-1], key=lambda layer: layer.features)
    last = rows[-1]
    if last.width < tight.features:
        return _graded(last.path, "reads", last.width, patient.num_classes)
    found = _graded(tight.path, "hands on", tight.features, patient.num_classes)
    return found if found and carries_all(patient, tight.path) else []


def _graded(path: str, does: str, count: int, classes: int) -> list[Finding]:
    if count == 0 or count >= classes / 2:
        return []
    text = f"all that {path} {does} of an image is {count} number{'s'[: count > 1]}, for {classes} classes"
    gravity = 0.9 if count == 1 else 0.75 if count == 2 else 0.55
    return [finding("too_little_capacity", text, gravity, certain=count == 1, layers=[path])]


def carries_all(patient: Patient, path: str) -> bool:
    """Whether scores no longer depend on the image where the module's output is the mean over images."""
    twin = widened(copy.deepcopy(patient.model)).eval()
    module = dict(twin.named_modules()).get(path)
    if module is None:
        return False

    def level(m: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.mean(0, keepdim=True).expand_as(output).contiguous()

    x, _ = chosen(patient, 16)
    with torch.no_grad(), isolated(patient):
        images = like(twin, patient.inputs(x))
        before = twin(images).double().std(0).mean()
        with hooked([module], leave=level):
            after = twin(images).double().std(0).mean()
    return bool(before > 0) and bool(after < 1e-4 * before)

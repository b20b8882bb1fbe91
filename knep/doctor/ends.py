"""Where a network ends in probabilities, and where it is too narrow for its classes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from knep.doctor.findings import Finding
from knep.doctor.naming import finding
from knep.doctor.patient import Patient
from knep.doctor.rows import Layer, Signals
from knep.doctor.signals import chosen, isolated, like, widened

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
    """too_little_capacity where everything passes through fewer numbers or channels than the classes ask for."""
    rows = seen.linear
    if len(rows) < 2 or patient.num_classes < 4:
        return []
    tight = min(rows[:-1], key=lambda layer: layer.features)
    thin = min((r for r in rows[:-1] if r.function.startswith("conv")), key=lambda r: r.units, default=tight)
    found = [_tight(patient, row, count) for row, count in ((tight, tight.features), (thin, thin.units))]
    head = _head(patient, rows)
    return sorted((f for f in (*found, head) if f is not None), key=lambda f: -f.gravity)[:1]


def _head(patient: Patient, rows: list[Layer]) -> Finding | None:
    return _graded(rows[-1], rows[-1].width, patient.num_classes)


def _tight(patient: Patient, row: Layer, count: int) -> Finding | None:
    suspected = _graded(row, count, patient.num_classes)
    return suspected if suspected is not None and carries_all(patient, row.path) else None


def _graded(row: Layer, count: int, classes: int) -> Finding | None:
    if count == 0 or count >= classes / 2:
        return None
    unit = "channel" if count == row.units != row.features else "number"
    text = f"all that {row.path} hands on of an image is {count} {unit}{'s'[: count > 1]}, for {classes} classes"
    certain = count == 1 and unit == "number"
    gravity = 0.9 if certain else 0.75 if count <= 2 else 0.55
    return finding("too_little_capacity", text, gravity, certain=certain, layers=[row.path])


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
        handle = module.register_forward_hook(level)
        try:
            after = twin(images).double().std(0).mean()
        finally:
            handle.remove()
    return bool(before > 0) and bool(after < 1e-4 * before)

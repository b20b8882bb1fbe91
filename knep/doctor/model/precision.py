"""Steps that a format of few bits rounds to nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from knep.doctor.findings import Finding, finding, share
from knep.doctor.model.signal_pass import chosen, forward, isolated, widened
from knep.doctor.subject.setup import Patient

_FORMATS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


def precision(patient: Patient) -> list[Finding]:
    """precision_underflow where the weights themselves are kept in 16 bits: the share of them that the first step
    moves in float32 and does not move in that format."""
    dtype = _dtype(patient)
    if dtype is None:
        return []
    start, wide = _step(patient, torch.float32)
    low_start, low = _step(patient, dtype)
    name = str(dtype).removeprefix("torch.")
    if low is None or wide is None:
        text = f"the weights are kept in {name}, in which a step cannot be made on this device"
        return [finding("precision_underflow", text, 0.5, certain=False)]
    moved = torch.cat([(a != b).flatten() for a, b in zip(start, wide, strict=True)])
    stayed = torch.cat([(a == b).flatten() for a, b in zip(low_start, low, strict=True)])
    lost = float((moved & stayed).float().sum() / moved.float().sum().clamp(min=1))
    broken = not all(bool(p.isfinite().all()) for p in low)
    text = f"the weights are kept in {name}: the first step loses {share(lost)} of the changes that float32 keeps"
    text += ", and leaves weights that are not finite" if broken else ""
    certain = lost > 0.5 or broken
    return [finding("precision_underflow", text, 0.9 if certain else 0.5 + 0.5 * lost, certain=certain)]


def _dtype(patient: Patient) -> torch.dtype | None:
    if patient.precision in _FORMATS:
        return _FORMATS[patient.precision]
    kept = [p.dtype for p in patient.model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4]
    return kept[0] if kept else None


def _step(patient: Patient, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """The trainable weights in `dtype` before and after the optimizer's first step; None where the device cannot."""
    twin: nn.Module = widened(copy.deepcopy(patient.model)).train().to(dtype)
    optimizer: Any = patient.make_optimizer(twin)
    weights = [p for p in twin.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    x, y = chosen(patient, 32)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = patient.criterion(forward(twin, patient.inputs(x).to(dtype)), y.to(patient.device))
        loss.backward()
        return loss

    with isolated(patient):
        try:
            optimizer.step(closure)
        except (RuntimeError, NotImplementedError):  # an operator that this device has not in this format
            return before, None
    return before, [p.detach() for p in weights]

"""The diseases of a model that one pass at the start, a few plain steps and the layers' settings show."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import nn

from knep.doctor.data.first_layer import entrance
from knep.doctor.findings import Finding, ordered
from knep.doctor.model.batch_norm import batch_norms
from knep.doctor.model.gradient_flow import cut_off, frozen
from knep.doctor.model.output_layer import double_softmax, narrow
from knep.doctor.model.precision import precision
from knep.doctor.model.propagation import propagation
from knep.doctor.model.rectified import rectified
from knep.doctor.model.signal_pass import affordable, chosen, forward, isolated, length, like, signals, widened
from knep.doctor.model.symmetry import symmetric
from knep.doctor.model.unregistered import unregistered
from knep.doctor.subject.setup import Patient
from knep.observe.rows import Signals

_SCALED = (0.2, 5.0)  # deviation of inputs whose size does not matter for the layers behind


def model_findings(patient: Patient, seen: Signals) -> list[Finding]:
    """The gravest first, one for each disease: certain ones, which are bugs, and suspicions for a trial to bear out."""
    after = stepped(patient)
    later = signals(patient, after)
    found = [
        *double_softmax(patient, seen),
        *rectified(patient, seen),
        *cut_off(patient, seen, later),
        *unregistered(patient),
        *frozen(patient.model, seen),
        *symmetric(patient.model, after, seen),
        *batch_norms(patient, seen),
        *precision(patient),
        *narrow(patient, seen),
    ]
    return list(ordered([*found, *passing(patient, seen, later, after)]))


def passing(patient: Patient, seen: Signals, later: Signals, after: object) -> list[Finding]:
    """Propagation where the layers are to blame, which a few steps do not mend, as they do blocks that start at zero;
    what only inputs of an odd size cause is a faint suspicion."""
    state = later if _asleep(seen) else seen
    lasting = {f.disease for f in propagation(later)}
    raw = [f for f in propagation(state) if f.disease in lasting]
    if _of_a_size(patient, seen):
        return raw
    own = propagation(signals(patient, after if state is later else None, standardized=True))  # pyright: ignore
    named = {f.disease for f in own}
    return own + [replace(f, certain=False, gravity=0.4 * f.gravity) for f in raw if f.disease not in named]


def _of_a_size(patient: Patient, seen: Signals) -> bool:
    """Whether the size of the inputs is no matter: near 1, made so by the model itself, or of indices, without any."""
    door = entrance(patient)
    mean, std = seen.input_mean, seen.input_std
    if door.own and door.x is not None and door.x.numel() > 1:
        mean, std = float(door.x.mean()), float(door.x.std())
    return door.tokens or (_SCALED[0] < std < _SCALED[1] and abs(mean) < _SCALED[1])


def _asleep(seen: Signals) -> bool:
    """Whether the last layer starts at zero, so that no gradient passes it as yet."""
    return bool(seen.linear) and seen.linear[-1].scale == 0


def stepped(patient: Patient, steps: int = 4, rate: float = 0.03) -> nn.Module:
    """A copy of the model after a few gradient steps on one batch, in training mode with dropout: what only starts
    at zero wakes up, what is cut off or symmetric stays so.

    A step moves each parameter by `rate` of its root mean square (of 1, where it is zero), so that layers whose
    gradient is tiny move like all others; a parameter whose gradient is zero stays.
    """
    twin = widened(copy.deepcopy(patient.model)).train()
    x, y = chosen(patient, affordable(patient, twin))
    with isolated(patient):
        images, y = like(twin, patient.inputs(x)), y.to(patient.device)
        for _ in range(steps):
            loss = patient.criterion(forward(twin, images), y)
            if not loss.requires_grad or not bool(loss.isfinite()):
                break
            twin.zero_grad()
            loss.backward()
            _descend(twin, rate)
    twin.zero_grad()
    return twin


def _descend(model: nn.Module, rate: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is None or not p.requires_grad:
                continue
            gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
            size = length(gradient)
            if 0 < size < math.inf:
                moved = rate * (length(p) or math.sqrt(p.numel()))
                p -= gradient * (moved / size) if size > 1e-15 else (gradient.double() * (moved / size)).to(p.dtype)

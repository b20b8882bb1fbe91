"""A few plain gradient steps on a copy: what only starts at zero wakes up, what is cut off or symmetric stays so."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from knep.doctor.model.signal_pass import affordable, chosen, forward, isolated, length, like, widened
from knep.doctor.subject.setup import Patient


def stepped(patient: Patient, steps: int = 4, rate: float = 0.03) -> nn.Module:
    """A copy of the model after gradient descent on one batch, in training mode with dropout.

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

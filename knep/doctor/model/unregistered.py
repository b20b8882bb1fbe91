"""Weights that a model uses but does not have: layers in a plain list, tensors that are no nn.Parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from knep.doctor.findings import Finding, finding, named
from knep.doctor.model.gradient_flow import looks_drawn
from knep.doctor.model.signal_pass import chosen, forward, isolated, like, still, widened
from knep.doctor.subject.copies import copied
from knep.doctor.subject.setup import Patient

_IMAGES = 16


def unregistered(patient: Patient) -> list[Finding]:
    """cut_off where the loss has a gradient for weights that no optimizer gets from `model.parameters()`.

    Trained ones may be hidden on purpose, as a teacher; they get no gradient or do not look drawn.
    """
    if not any(_unknown(patient.model)):
        return []
    twin = widened(copied(patient.model)).train()
    still(twin)
    x, y = chosen(patient, _IMAGES)
    with isolated(patient):
        loss = patient.criterion(forward(twin, like(twin, patient.inputs(x))), y.to(patient.device))
    if not loss.requires_grad:
        return []
    loss.backward()
    used = [(path, t) for path, t in _unknown(twin) if t.grad is not None]
    matrices = [t for _, t in used if t.ndim > 1]
    if not used or (matrices and not any(map(looks_drawn, matrices))):
        return []
    paths = list(dict.fromkeys(path for path, _ in used))
    count = sum(t.numel() for _, t in used)
    text = f"{named(paths)}: the loss depends on {count:,} weights that are not among the model's parameters"
    text += ", so that no optimizer has them"
    mend = "keep layers in nn.ModuleList or nn.ModuleDict, and single weights as nn.Parameter"
    return [finding("cut_off", text, 0.97, layers=paths, mend=mend)]


def _unknown(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path of the layer or tensor, weight) for leaves with requires_grad that the model does not list."""
    known = {id(p) for p in model.parameters()}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            for where, weight in _inside(value, f"{path}.{name}".lstrip(".")):
                if id(weight) not in known | seen and weight.requires_grad and weight.is_leaf:
                    seen.add(id(weight))
                    yield where, weight


def _inside(value: Any, path: str, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        for name, weight in value.named_parameters():
            yield f"{path}.{name}".rpartition(".")[0], weight
    elif depth and isinstance(value, (Mapping, list, tuple)):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in parts:
            yield from _inside(part, f"{path}[{key}]", depth - 1)

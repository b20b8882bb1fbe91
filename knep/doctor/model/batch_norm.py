"""Batch norm: too few values for its statistics, and running statistics that cannot follow."""

from __future__ import annotations

import copy

from torch.nn.modules.batchnorm import _BatchNorm

from knep.doctor.findings import Finding, finding, named, share
from knep.doctor.subject.setup import Patient
from knep.observe.rows import Signals

_FEW_VALUES, _FEW_IMAGES = 4, 16


def batch_norms(patient: Patient, seen: Signals) -> list[Finding]:
    """tiny_norm_batches and stale_statistics, from the layers as they are set."""
    twin = copy.deepcopy(patient.model).train()  # a model may keep some of them in eval mode
    norms = [(path, m) for path, m in twin.named_modules() if isinstance(m, _BatchNorm) and path in seen.called]
    return [*_tiny(patient, seen, norms), *_stale(patient, norms)] if norms else []


def _tiny(patient: Patient, seen: Signals, norms: list[tuple[str, _BatchNorm]]) -> list[Finding]:
    images = min(len(y) for _, y in patient.train[:-1] or patient.train)  # the last may be a rest
    places = {row.path: row.features // max(1, row.units) for row in seen.layers if row.function == "batch_norm"}
    counts = {}
    for path, norm in norms:
        if norm.training or not norm.track_running_stats:
            group = min(images, getattr(norm, "ghost_size", images))
            counts[path] = (group * places.get(path, 1), group, places.get(path, 1))
    if not counts:
        return []
    values, group, place = min(counts.values())
    if group >= _FEW_IMAGES:
        return []
    layers = [path for path, count in counts.items() if count[0] == values]
    text = f"{named(layers)}: a channel's mean and variance come from {group} images x {place} places = {values} values"
    certain = values <= _FEW_VALUES or group == 1
    gravity = 0.9 if certain else 0.75 if group <= 4 else 0.5
    return [finding("tiny_norm_batches", text, gravity, certain=certain, layers=layers)]


def _stale(patient: Patient, norms: list[tuple[str, _BatchNorm]]) -> list[Finding]:
    steps = patient.total_steps * patient.accumulate
    worst: dict[str, tuple[float, bool, str]] = {}
    for path, norm in norms:
        judged = _judged(norm, steps)
        if judged is not None:
            worst[path] = judged
    if not worst:
        return []
    gravity, certain, text = max(worst.values())
    layers = [path for path, row in worst.items() if row[2] == text]
    return [finding("stale_statistics", f"{named(layers)}: {text}", gravity, certain=certain, layers=layers)]


def _judged(norm: _BatchNorm, steps: int) -> tuple[float, bool, str] | None:
    """(gravity, certain, text) of a layer whose running statistics will not fit; steps: forward passes of the run."""
    if norm.running_mean is None or norm.running_var is None:
        return None
    if not bool(norm.running_mean.isfinite().all() & norm.running_var.isfinite().all()):
        return 0.97, True, "its running statistics are not finite"
    if not norm.training:
        if norm.running_mean.any() or bool((norm.running_var != 1).any()):
            return None  # a trained model's, kept on purpose
        return 0.5, False, "it stays in eval mode in training, with the mean 0 and variance 1 that it was built with"
    if norm.momentum is None:
        return (0.45, False, "momentum=None averages over all steps since the start") if steps > 1 else None
    if norm.momentum <= 0 or norm.momentum > 1:
        return 0.95, True, f"momentum={norm.momentum:g} lets the running statistics follow nothing"
    follows = 1 - (1 - norm.momentum) ** steps
    text = f"momentum={norm.momentum:g} takes in {share(follows)} of the statistics in the run's {steps} steps"
    if follows < 0.95:
        return (0.9 if follows < 0.5 else 0.6), follows < 0.1, text
    if norm.momentum >= 0.9:
        return 0.5, False, f"momentum={norm.momentum:g} keeps little more than the last batch"
    return None

"""Parts that no gradient reaches, that the optimizer does not have, or that are frozen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from knep.doctor.findings import Finding, finding, named, share
from knep.doctor.model.healthy_ranges import hidden_bends
from knep.doctor.subject.setup import Patient
from knep.observe.rows import Signals, Weight

_TRIFLE = 0.01  # share of the weights, below which a part that is cut off costs little
_RANDOM = 1.15  # largest singular value by that of independent numbers; trained weights reach far beyond


def owner(name: str) -> str:
    """Path of the module that has a parameter; of the parametrized one, where it is a parametrization's."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def cut_off(patient: Patient, seen: Signals, later: Signals) -> list[Finding]:
    """cut_off: certain where the graph or the optimizer leaves a layer out, a suspicion where its gradient is only zero
    and dead or saturated units explain that. seen: at the start, later: after a few steps."""
    found = [*_by_graph(seen, later), *_by_optimizer(patient, seen)]
    return found or _by_zeros(seen, later)


def _by_graph(seen: Signals, later: Signals) -> list[Finding]:
    lost = _layers(seen.weights, lambda a, b: a.gradient is None and b.gradient is None, later)
    if not lost:
        return []
    part = _share(lost, seen)
    idle = [path for path in lost if path not in seen.called]
    if len(idle) == len(lost):
        how = "the forward pass does not call them"
    elif not seen.reached:
        how = "the loss depends on no parameter, as behind detach, no_grad or numpy"
    else:
        how = "the graph ends behind them, as by detach or no_grad"
    text = f"no gradient reaches {named(lost)}, {share(part)} of the weights: {how}"
    return [finding("cut_off", text, _grave(part), layers=lost)]


def _by_zeros(seen: Signals, later: Signals) -> list[Finding]:
    lost = _layers(seen.weights, lambda a, b: not a.gradient and not b.gradient, later)
    if not lost or not seen.finite:
        return []
    part, explained = _share(lost, seen), _explained(seen) or _explained(later)
    text = f"the gradient of {named(lost)}, {share(part)} of the weights, is exactly zero, even after a few steps"
    gravity = 0.4 if explained else _grave(part) - 0.05
    return [finding("cut_off", text, gravity, certain=not explained, layers=lost)]


def _explained(seen: Signals) -> bool:
    """Whether zeros come from units that are dead or saturated, zero weights or a gradient below what floats hold."""
    ends = [max(layer.dead or 0, layer.saturated or 0) for layer in hidden_bends(seen)]
    flows = [layer.flow for layer in seen.linear if layer.flow]
    return (
        max(ends, default=0.0) > 0.98
        or any(layer.scale == 0 for layer in seen.linear)
        or min(flows, default=1.0) < 1e-25
    )


def _by_optimizer(patient: Patient, seen: Signals) -> list[Finding]:
    twin = copy.deepcopy(patient.model)
    groups = patient.make_optimizer(twin).param_groups
    has = {id(p) for group in groups for p in group["params"]}
    rates = [float(group["lr"]) for group in groups if "lr" in group]
    still = {id(p) for g in groups if "lr" in g and float(g["lr"]) == 0 for p in g["params"]} if any(rates) else set()
    missing = [n for n, p in twin.named_parameters() if p.requires_grad and (id(p) not in has or id(p) in still)]
    if not missing:
        return []
    layers = list(dict.fromkeys(owner(n) for n in missing))
    part = sum(w.numel for w in seen.weights if w.name in set(missing)) / max(1, sum(w.numel for w in seen.weights))
    how = "has a learning rate of 0 for" if still else "does not have"
    text = f"the optimizer {how} {len(missing)} parameters, {share(part)} of the weights: those of {named(layers)}"
    return [finding("cut_off", text, _grave(part), layers=layers)]


def _layers(weights: Sequence[Weight], lost: Callable[[Weight, Weight], bool], later: Signals) -> list[str]:
    """Paths of modules for all of whose trainable parameters `lost(at first, later)` holds."""
    after = {w.name: w for w in later.weights}
    groups: dict[str, list[bool]] = {}
    for w in weights:
        if w.trainable and w.numel:
            groups.setdefault(owner(w.name), []).append(lost(w, after[w.name]))
    return [path or "model" for path, all_lost in groups.items() if all(all_lost)]


def _share(paths: Iterable[str], seen: Signals) -> float:
    inside = set(paths)
    numbers = [(w.numel, (owner(w.name) or "model") in inside) for w in seen.weights]
    return sum(n for n, lost in numbers if lost) / max(1, sum(n for n, _ in numbers))


def _grave(part: float) -> float:
    return 0.98 if part > 0.5 else 0.92 if part > _TRIFLE else 0.6


def frozen(model: nn.Module, seen: Signals) -> list[Finding]:
    """frozen_parameters: certain where matrices that look as they were drawn make a tenth of all or are the last layer;
    a suspicion where they look trained."""
    held = [w for w in seen.weights if not w.trainable and w.ndim > 1]
    vectors = [w for w in seen.weights if not w.trainable and w.ndim <= 1]
    if not held and not vectors:
        return []
    values = dict(model.named_parameters())
    drawn = [w for w in held if looks_drawn(values[w.name])]
    matrices = sum(w.numel for w in seen.weights if w.ndim > 1)
    part = sum(w.numel for w in drawn) / max(1, matrices)
    final = seen.linear[-1].path if seen.linear else ""
    certain = part >= 0.1 or any(owner(w.name) == final for w in drawn)
    layers = list(dict.fromkeys(owner(w.name) for w in (held or vectors)))
    numbers = sum(w.numel for w in held + vectors) / max(1, sum(w.numel for w in seen.weights))
    how = "random as at the start" if drawn else "which look trained" if held else "of gains and biases"
    count = len(held + vectors)
    text = f"requires_grad is False for {count} parameters, {share(numbers)} of all, {how}: {named(layers)}"
    return [finding("frozen_parameters", text, 0.8 + 0.15 * part if certain else 0.35, certain=certain, layers=layers)]


def looks_drawn(weight: Tensor) -> bool:
    """Whether a matrix could be independent draws: its largest singular value is about s (sqrt(m) + sqrt(n)).

    Marchenko and Pastur 1967; training adds directions far beyond. Matrices under eight rows or columns tell nothing
    and count as drawn, as those of one value or of numbers that are not finite do.
    """
    rows = weight.detach().double().flatten(1)
    m, n = rows.shape
    rows = rows - rows.mean()
    size = float(rows.square().mean().sqrt())
    if min(m, n) < 8 or size == 0 or not math.isfinite(size):
        return True
    square = rows @ rows.T if m < n else rows.T @ rows  # its eigenvalues cost a fraction of the singular values
    return float(torch.linalg.eigvalsh(square)[-1]) ** 0.5 < _RANDOM * size * (math.sqrt(m) + math.sqrt(n))

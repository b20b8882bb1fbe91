"""Units that are copies of each other, and stay so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from knep.doctor.findings import Finding, finding, named, share
from knep.observe.rows import Signals

_SAME = 1 - 1e-5  # cosine of two rows that count as one
_ALIKE = 0.99  # cosine of two movements: behind a norm, rounding alone turns gradients that are equal by 2 degrees
_MOST = 512  # rows compared
_LEAST_FAN = 3  # rows of one or two numbers are parallel by chance


def symmetric(before: nn.Module, after: nn.Module, seen: Signals) -> list[Finding]:
    """symmetric_weights, certain where units point alike at the start and a few steps moved them alike.

    Two units with parallel weights compute the same but for a factor, so the gradient keeps them parallel. Rows that
    the first steps tell apart, as those of a head that starts at zero, are sound.
    """
    final = seen.linear[-1].path if seen.linear else ""
    own = dict(after.named_modules())
    stay: list[tuple[str, float]] = []
    alike: list[tuple[str, float]] = []
    for path, layer in before.named_modules():
        rows = _rows(layer)
        if rows is None or path == final:
            continue
        moved = _rows(own[path])
        assert moved is not None
        same = _pairs(rows)
        if _copies(same) >= 0.5 and rows.any():
            alike.append((path, _copies(same)))
        if (part := _copies(same & _pairs(moved - rows, _ALIKE))) >= 0.5:
            stay.append((path, part))
    if stay:
        return [_found(stay, "and gradient steps move them alike", 0.96, True)]
    return [_found(alike, "at the start", 0.55, False)] if alike else []


def _found(layers: list[tuple[str, float]], how: str, gravity: float, certain: bool) -> Finding:
    paths = [path for path, _ in layers]
    worst = max(part for _, part in layers)
    text = f"{share(worst)} of the units have the weights of another unit in {named(paths)}, {how}"
    return finding("symmetric_weights", text, gravity, certain=certain, layers=paths)


def _rows(layer: nn.Module) -> Tensor | None:
    """Weights (units, fan_in) in float64 of at most _MOST units; None where units read different inputs."""
    if isinstance(layer, _ConvNd):
        if layer.groups > 1 or layer.transposed:
            return None
    elif not isinstance(layer, nn.Linear):
        return None
    if isinstance(layer.weight, nn.UninitializedParameter):
        return None
    rows = layer.weight.detach().double().flatten(1)[:_MOST]
    return rows if len(rows) > 1 and rows.shape[1] >= _LEAST_FAN and bool(rows.isfinite().all()) else None


def _pairs(rows: Tensor, least: float = _SAME) -> Tensor:
    """(units, units): whether two rows point the same way, by their cosine; rows of zeros point as each other."""
    zero = ~rows.any(1)
    unit = F.normalize(rows, dim=1)
    return (unit @ unit.T > least) | (zero[:, None] & zero)


def _copies(pairs: Tensor) -> float:
    """Share of units that are like an earlier one."""
    return float(torch.tril(pairs, diagonal=-1).any(1).double().mean()) * len(pairs) / max(1, len(pairs) - 1)

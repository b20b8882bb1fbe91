"""Outputs and targets that do not lie beside each other: shapes that broadcast, a view where a permute was meant."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from knep.doctor.checks.probe import Probe
from knep.doctor.findings import Finding, finding
from knep.doctor.subject.any_batch import mapped, tensors


def broadcast(p: Probe) -> list[Finding]:
    """broadcast_shapes where the loss of the rows together is not that of each alone, until a target has another form;
    or where PyTorch itself warns of two sizes."""
    if not p.judged or p.rows < 3 or p.y is None:
        return []
    z = p.scores
    z = _apart(z, p.y)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        given = p.loss(z)
    if any("target size" in str(w.message) for w in said):
        return [_named(p, z, tuple(p.y.shape), "")]
    rows = _by_rows(p, z, p.target)
    if rows is None or _close(given, rows):
        return []
    for other in _forms(p):
        try:
            value, alone = p.loss(z, other), _by_rows(p, z, other)
        except Exception:  # the loss takes the one form alone
            continue
        if alone is not None and _close(value, alone) and not _same(other, p.target):
            turned = next((tuple(t.shape) for t, o in zip(tensors(other), tensors(p.target), strict=True)
                           if t.shape != o.shape), ())  # fmt: skip
            return [_named(p, z, turned, f"; the loss is {given:.3g}, and {value:.3g} with {turned}, as row by row")]
    return []


def _named(p: Probe, z: Tensor, turned: tuple[int, ...], more: str) -> Finding:
    targets = [tuple(t.shape) for t in tensors(p.target)]
    shown = " and ".join(map(str, targets))
    text = f"the model gives {tuple(z.shape)} for {p.rows} rows and the target is {shown}: the loss spreads them to a "
    text += f"table, which compares each row with the targets of others{more}"
    y, out = targets[0], tuple(z.shape)
    mend = "give the target the shape of the output, y.view_as(output)"
    if len(y) == len(out) + 1:
        mend = "give both one shape: y.squeeze(1), or no squeeze at the end of the model"
    elif len(out) == len(y) + 1 and out[-1] == 1:
        mend = "give both one shape: output.squeeze(-1), or y.unsqueeze(-1)"
    elif (*y[:1], 1) == y and turned == y[:1]:
        mend = "give the target one axis less: y.squeeze(1)"
    return finding("broadcast_shapes", text, 0.98, mend=mend)


def _apart(z: Tensor, y: Tensor) -> Tensor:
    """Outputs of which no two rows are alike, and each near its own target where there is one number for each."""
    size = z.std(correction=0).clamp(min=0.1)
    if z.numel() == y.numel() and not z.is_complex():
        own = y.reshape(z.shape).to(z)
        z = z.mean() + size * (own - own.mean()) / own.std(correction=0).clamp(min=1e-6)
    return z + 0.3 * size * _drawn(z)


def _drawn(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def _by_rows(p: Probe, z: Tensor, target: object) -> tuple[float, float] | None:
    """(mean, sum) of the loss over single rows; None where it takes no single row."""
    alone = []
    for i in range(p.rows):
        pick = slice(i, i + 1)
        own = mapped(target, lambda t, pick=pick: t[pick] if t.ndim and len(t) == p.rows else t)
        try:
            alone.append(p.loss(z[pick], own))
        except Exception:  # a loss that takes no single row is judged by other checks
            return None
    kept = [v for v in alone if v == v]  # a mean over no counted label is NaN
    return (sum(kept) / len(kept), sum(kept)) if kept else None


def _close(value: float, wanted: tuple[float, float]) -> bool:
    return any(abs(value - w) <= 2e-3 * abs(w) + 1e-5 for w in wanted)


def _forms(p: Probe) -> Iterator[object]:
    """The target in other forms: one of its tensors with an axis of one more or less, or as the output is."""

    def turned(number: int, how: str) -> object:
        count = iter(range(100))

        def change(t: Tensor) -> Tensor:
            if next(count) != number:
                return t
            if how == "less":
                return t.squeeze(1) if t.ndim > 1 and t.shape[1] == 1 else t.squeeze(-1) if t.ndim > 1 else t
            if how == "more":
                return t.unsqueeze(1)
            return t.reshape(p.scores.shape) if t.numel() == p.scores.numel() else t

        return mapped(p.target, change)

    for number in range(len(list(tensors(p.target)))):
        for how in ("less", "more", "as the output"):
            yield turned(number, how)


def _same(a: object, b: object) -> bool:
    return all(s.shape == t.shape for s, t in zip(tensors(a), tensors(b), strict=True))


def scrambled(p: Probe) -> list[Finding]:
    """scrambled_view where the target of one place moves the slope of scores at other places."""
    y, z = p.y, p.scores
    if not p.judged or y is None or y.ndim < 2 or y.is_floating_point() or p.subject.task == "multilabel":
        return []
    axis = _class_axis(z, y)
    if axis is None:
        return []
    classes = z.shape[axis]
    lost = kept = 0
    for row, place in ((0, 0), (1, y[0].numel() // 2), (p.rows - 1, y[0].numel() - 2)):
        other = y.clone()
        flat = other[row % p.rows].view(-1)
        if not 0 <= int(flat[place]) < classes:
            continue
        flat[place] = (flat[place] + 1) % classes
        try:
            changed = (p.slope(z, mapped(p.target, lambda t, o=other: o if t is y else t)) - p.slope(z)).abs()
        except Exception:  # a loss with its own demands
            return []
        total = changed.movedim(axis, -1).flatten(1, -2).sum(-1)
        at = (total > 0.2 * total.max()).nonzero()  # a mean by weights moves all a little
        kept += len(at) == 1
        lost += len(at) > 1
    if lost < 2 or kept:
        return []
    shown = f"the model gives {tuple(z.shape)}, classes along axis {axis}, and the target is {tuple(y.shape)}"
    text = f"{shown}: the target of one place moves the scores of several others"
    return [finding("scrambled_view", text, 0.96, mend=f"bring the classes last before you flatten: "
                    f"output.movedim({axis}, -1).reshape(-1, {classes})")]  # fmt: skip


def _class_axis(z: Tensor, y: Tensor) -> int | None:
    """The only axis of scores that the target lacks."""
    if z.ndim != y.ndim + 1:
        return None
    fits = [a for a in range(1, z.ndim) if tuple(s for i, s in enumerate(z.shape) if i != a) == tuple(y.shape)]
    return fits[0] if len(fits) == 1 else None

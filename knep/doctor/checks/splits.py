"""Training and validation against each other, for rows of any kind: copies, windows that overlap, another scale."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from knep.doctor.findings import Finding, finding
from knep.doctor.subject.any_task import Subject

_ROWS = 3000


def leaked(subject: Subject) -> list[Finding]:
    """leaked_validation: rows of validation that are rows of training, beyond what rows of few values have by chance;
    near copies; and windows of a series that overlap."""
    train, val = (subject.stacked(s, _ROWS) for s in ("train", "val"))
    if train is None or val is None or len(val[0]) < 20 or train[0].shape[1:] != val[0].shape[1:]:
        return []
    x, v = (part[0].flatten(1) for part in (train, val))
    if x.shape[1] < 2:
        return []
    return _exact(x, v) or _windows(train[0], val[0]) or _near(x, v)


def chance_copies(x: Tensor) -> float:
    """Share of new rows that are among rows (N, F) by chance: one less the share of rows seen once.

    Good 1953, The Population Frequencies of Species and the Estimation of Population Parameters.
    """
    counts = Counter(_bytes(x))
    return 1 - sum(c == 1 for c in counts.values()) / max(1, len(x))


def _bytes(x: Tensor) -> list[bytes]:
    flat = x.detach().cpu().contiguous()
    return [r.tobytes() for r in (flat.float() if flat.dtype == torch.bfloat16 else flat).numpy()]


def _exact(x: Tensor, v: Tensor) -> list[Finding]:
    known = set(_bytes(x))
    both = sum(key in known for key in set(_bytes(v)))  # each once: rows without any number are many
    numbers = _continuous(x)
    usual = 0.0 if numbers else chance_copies(x)
    part = both / len(v)
    if both < 4 or part < 0.02 + 1.5 * usual + 4 * (usual / len(v)) ** 0.5:
        return []
    text = f"{both} of {len(v)} rows of validation are rows of training, number by number"
    text += f" ({100 * usual:.2g} % would be by chance)" if usual else ""
    return [finding("leaked_validation", text, min(0.9, 0.6 + part))]


def _continuous(x: Tensor) -> bool:
    """Whether most columns have hardly a number twice, so that no two rows are equal by chance."""
    if not x.is_floating_point():
        return False
    few = [len(x[:, c].unique()) > 0.3 * len(x) for c in range(0, x.shape[1], max(1, x.shape[1] // 16))]
    return sum(few) > 0.5 * len(few)


def _near(x: Tensor, v: Tensor) -> list[Finding]:
    """Rows with a neighbour far nearer than the next ones, more often in validation than between rows of training."""
    if not _continuous(x) or x.shape[1] < 3 or x.shape[1] > 4096 or len(x) < 50:
        return []
    mean, size = x.double().mean(0), x.double().std(0).clamp(min=1e-9)
    bank, asked = ((t.double() - mean) / size for t in (x, v))
    if not bool(bank.isfinite().all() and asked.isfinite().all()):
        return []
    far = _ratios(asked[:1000], bank, own=False)
    own = _ratios(bank[:1000], bank, own=True)
    part, inside = float((far < 0.2).double().mean()), float((own < 0.2).double().mean())
    same = float((far < 0.03).double().mean())  # so near is nobody by chance
    if (part < 0.05 + 2 * inside and same < 0.1) or int((far < 0.2).sum()) < 4:
        return []
    text = (
        f"{100 * part:.3g} % of the rows of validation have a neighbour in training five times nearer than their tenth "
    )
    text += f"one (within training {100 * inside:.2g} %): copies but for slight noise"
    return [finding("leaked_validation", text, min(0.85, 0.55 + part))]


def _ratios(asked: Tensor, bank: Tensor, own: bool) -> Tensor:
    far = torch.cdist(asked, bank)
    if own:
        far[torch.arange(len(asked)), torch.arange(len(asked))] = torch.inf
    far = far.topk(min(10, len(bank)), largest=False).values
    return far[:, 0] / far[:, -1].clamp(min=1e-9)


def _windows(x: Tensor, v: Tensor) -> list[Finding]:
    """Windows (N, L, ...) of validation that are windows of training but a step further."""
    if x.ndim not in (2, 3) or x.shape[1] < 6:
        return []
    if chance_copies(x[:, 1:].flatten(1)) > 0.05 or not (_continuous(x.flatten(1)) or not x.is_floating_point()):
        return []
    part = 0.0
    for step in (1, 2):
        ends = set(_bytes(x[:, step:].flatten(1))), set(_bytes(x[:, :-step].flatten(1)))
        before, behind = _bytes(v[:, step:].flatten(1)), _bytes(v[:, :-step].flatten(1))
        hits = sum(a in ends[1] or b in ends[0] for a, b in zip(before, behind, strict=True))
        part = max(part, hits / len(v))
    if part < 0.2:
        return []
    text = (
        f"{100 * part:.3g} % of the windows of validation overlap one of training but for a step or two: the split was "
    )
    text += "drawn among windows, and not in time"
    return [
        finding("leaked_validation", text, 0.85, mend="split the series in time, and then cut each part into windows")
    ]


def scales(subject: Subject) -> list[Finding]:
    """validation_scaled_differently: columns whose size or centre in validation is far from those of training."""
    train, val = (subject.stacked(s, _ROWS) for s in ("train", "val"))
    if train is None or val is None or len(val[0]) < 20 or train[0].shape[1:] != val[0].shape[1:]:
        return []
    for what, a, b in (("inputs", train[0], val[0]), ("targets", train[1], val[1])):
        if not a.is_floating_point() or (what == "targets" and subject.task != "regression"):
            continue
        a, b = (_columns(t) for t in (a, b))
        if not bool(a.isfinite().all() and b.isfinite().all()):
            continue
        ratio = b.std(0).clamp(min=1e-12) / a.std(0).clamp(min=1e-12)
        moved = (b.mean(0) - a.mean(0)).abs() / a.std(0).clamp(min=1e-12)
        used = (a.std(0) > 1e-9) & (b.std(0) > 1e-9)
        if not bool(used.any()):
            continue
        median, shift = float(ratio[used].median()), float(moved[used].median())
        if 0.3 < median < 3.3 and shift < 4:
            continue
        text = f"{what} of validation have {median:.3g} times the deviation of those of training, and their mean lies "
        text += f"{shift:.3g} deviations away, at the median over {int(used.sum())} columns"
        mend = "give both splits the same scaling, with statistics of the training split"
        return [finding("validation_scaled_differently", text, 0.93, mend=mend)]
    return []


def _columns(t: Tensor) -> Tensor:
    """Rows by columns: the features of a table, the channels of images and of series."""
    t = t.double()
    if t.ndim == 1:
        return t[:, None]
    if t.ndim == 2:
        return t
    return t.movedim(1, -1).flatten(0, -2) if t.ndim == 4 else t.flatten(0, -2)

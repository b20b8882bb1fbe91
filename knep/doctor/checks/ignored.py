"""Labels that the loss leaves out though they are classes, and padding that it counts or that the model reads."""

from __future__ import annotations

import torch
from torch import Tensor

from knep.doctor.checks.probe import Probe, probe
from knep.doctor.findings import Finding, finding
from knep.doctor.subject.any_batch import mapped
from knep.doctor.subject.any_task import Subject

_LEAST = 0.005  # share of the targets that a class which is left out must have


def ignored(subject: Subject) -> list[Finding]:
    """ignored_class where scores get no slope from a class, that is no padding; padding_counted where they get one from
    padding."""
    if subject.task == "multilabel":
        return _labels_left_out(subject)
    if subject.task not in ("multiclass", "segmentation", "tokens", "tagging"):
        return []
    p = probe(subject, rows=64)
    y, axis = p.y, subject.class_axis
    if not p.judged or y is None or axis is None or axis >= p.scores.ndim:
        return []
    if y.ndim == p.scores.ndim and y.shape[1] == 1:
        y = y[:, 0]
    z = 0.1 * torch.randn(p.scores.shape, generator=torch.Generator().manual_seed(0)).to(p.scores)
    try:
        slope = p.slope(z).abs().movedim(axis, -1).sum(-1)
    except Exception:  # a loss with its own demands
        return []
    if slope.shape != y.shape:
        return []
    out = _left_out(subject, y, slope, p.scores.shape[axis])
    return out or _counted(p, y, slope)


def _labels_left_out(subject: Subject) -> list[Finding]:
    """The same of one label of several, whose column of scores gets no slope."""
    p = probe(subject, rows=64)
    if not p.judged or p.y is None or p.y.shape != p.scores.shape or p.scores.ndim != 2:
        return []
    inside = torch.rand(p.scores.shape, generator=torch.Generator().manual_seed(0)).to(p.scores)
    try:
        slope = p.slope(0.1 + 0.8 * inside).abs().amax(0)
    except Exception:  # a loss with its own demands
        return []
    lost = (slope < 1e-6 * slope.median()).nonzero().flatten().tolist()
    if not lost or len(lost) == len(slope):
        return []
    text = f"the loss leaves label {', '.join(map(str, lost[:5]))} of {len(slope)} out: its scores get no gradient"
    return [finding("ignored_class", text, 0.97, mend="give each label a weight above 0")]


def _left_out(subject: Subject, y: Tensor, slope: Tensor, classes: int) -> list[Finding]:
    usual = float(slope[slope > 0].median()) if bool((slope > 0).any()) else 0.0
    lost = []
    for k in y.unique().tolist():
        if not 0 <= k < classes or usual == 0:
            continue
        if float(slope[y == k].max()) < 1e-6 * usual and float((y == k).float().mean()) > _LEAST:
            lost.append(int(k))
    lost = [k for k in lost if not (y.ndim == 2 and _at_an_end(y, k))]
    if not lost:
        return []
    name = ", ".join(map(str, lost[:5]))
    part = float(torch.isin(y, torch.tensor(lost)).float().mean())
    index = getattr(subject.loss, "ignore_index", None)
    weight = getattr(subject.loss, "weight", None)
    why = f", which is its ignore_index={index}" if index in lost else ""
    why = why or (", whose weight is 0" if isinstance(weight, Tensor) else "")
    text = (
        f"the loss leaves class {name} out{why}: {100 * part:.3g} % of the labels give no gradient, so that this class "
    )
    text += "is never predicted"
    return [finding("ignored_class", text, 0.97)]


def _at_an_end(y: Tensor, k: int) -> bool:
    """Whether a label only fills rows up: at the end of them, or at their beginning."""
    for rows in (y, y.flip(1)):
        run = (rows.flip(1) == k).long().cumprod(1).sum(1)
        there = (rows == k).sum(1)
        if bool((there > 0).any()) and float(run.sum()) > 0.95 * float(there.sum()) and bool((run < y.shape[1]).any()):
            return True
    return False


def padding(t: Tensor) -> int | float | None:
    """The number that fills rows (N, L) of a sequence up at their end, None where there is none."""
    if t.ndim != 2 or t.shape[1] < 4 or len(t) < 4:
        return None
    last = t[:, -1]
    value, often = last.mode().values, float((last == last.mode().values).float().mean())
    if often < 0.4 or float((t == value).float().mean()) > 0.9:
        return None
    run = (t.flip(1) == value).long().cumprod(1).sum(1)
    inside = float((t == value).sum() - run.sum())
    long = float((run >= 2).float().mean()) > 0.3 and len(run.unique()) > 2
    return value.item() if long and inside <= 0.02 * float(run.sum()) else None


def _counted(p: Probe, y: Tensor, slope: Tensor) -> list[Finding]:
    """padding_counted where the target is padding, and so is the input, and the loss counts it."""
    if y.ndim != 2:
        return []
    whole = p.subject.stacked("train", 512)
    if whole is None or whole[1].ndim != 2 or p.x is None or p.x.shape[:2] != y.shape or padding_of(p.x) is None:
        return []
    fill, at = padding(whole[1]), y
    if fill is not None:
        at = y == fill
    else:  # a label that occurs elsewhere as well, as the first class does
        at = _filled(p.x)
        fill = float(y[at].mode().values) if bool(at.any()) else -1.0
        if not bool(at.any()) or float((y[at] == fill).float().mean()) < 0.99 or bool((y[~at] == y[~at][:1]).all()):
            return []
    if not fill >= 0:
        return []
    part = float(at.float().mean())
    if part < 0.1 or float(slope[at].median()) < 1e-6 * float(slope[~at].median()):
        return []
    text = (
        f"{100 * part:.3g} % of the targets are {fill:g}, which fills rows up at their end, and the loss counts them "
    )
    text += "as any other: it falls as the model learns where rows end"
    mend = f"leave them out: ignore_index={fill:g} if no class has that number, else a target of -100 there"
    return [finding("padding_counted", text, 0.93, mend=mend)]


def _filled(x: Tensor) -> Tensor:
    """Which places (N, L) of tokens (N, L), or of numbers (N, L, F), are padding at the end of their rows."""
    value = padding_of(x)
    still = (x == value) if x.ndim == 2 else (x == value).all(2)
    return still.flip(1).long().cumprod(1).flip(1).bool()


def padding_of(x: Tensor) -> int | float | None:
    """The padding of tokens (N, L), or of numbers (N, L, F) whose last places are all one value."""
    if x.ndim == 3:
        still = (x == x[:, -1:, :1]).all(2)
        flat = torch.where(still, x[:, -1:, 0], torch.nan)
        marked = torch.where(still, 0.0, 1.0) if bool(still.any()) else None
        return None if marked is None or padding(marked) is None or flat.ndim != 2 else float(x[0, -1, 0])
    return padding(x) if x.ndim == 2 and not x.is_floating_point() else None


def reads_padding(p: Probe) -> list[Finding]:
    """padding_counted where the answer for a row moves much with how far it was filled up."""
    seen = p.subject.stacked("train", 512)
    x, z = p.x, p.scores
    if seen is None or x is None or x.ndim < 2 or p.subject.task == "other":
        return []
    fill = padding_of(seen[0])
    if fill is None:
        return []
    still = (x == fill) if x.ndim == 2 else (x == fill).all(2)
    length = x.shape[1] - still.flip(1).long().cumprod(1).sum(1)
    if int(length.max()) >= x.shape[1] - 1 and float((length < x.shape[1] - 1).float().mean()) < 0.3:
        return []
    moved, rows = [], [i for i in range(p.rows) if 1 < int(length[i]) < x.shape[1] - 1][:6]
    if len(rows) < 3 or z.ndim < 1 or len(z) != p.rows:
        return []
    for i in rows:
        n = int(length[i])
        cut = mapped(p.batch, lambda t, i=i, n=n: _row(t, i, n, p.rows, x))
        try:
            own = p.again(cut)
        except Exception:  # a model of one length alone
            return []
        whole = z[i : i + 1]
        if z.ndim > 1 and z.shape[1] == x.shape[1]:
            whole = whole[:, :n]
        elif z.ndim > 2 and z.shape[2] == x.shape[1]:
            whole = whole[:, :, :n]
        if own.shape != whole.shape:
            return []
        moved.append(float((own - whole).abs().mean()))
    spread = float(z.std(0).mean() if z.ndim > 1 else z.std())
    share = sorted(moved)[len(moved) // 2] / max(spread, 1e-12)
    part = float(still.float().mean())
    if share < 0.5 or part < 0.15:
        return []
    text = (
        f"{100 * part:.3g} % of the places are {fill:g}, which fills rows up: without them the answer for a row moves "
    )
    text += f"by {share:.2g} of the spread between rows"
    mend = "mask what is filled up in attention, means and the last state (pack_padded_sequence), or pool over lengths"
    return [finding("padding_counted", text, 0.7, mend=mend)]


def _row(t: Tensor, i: int, n: int, rows: int, x: Tensor) -> Tensor:
    """One row of a batch, as long as it is without padding."""
    if not t.ndim or len(t) != rows:
        return t
    own = t[i : i + 1]
    return own[:, :n] if t.ndim > 1 and t.shape[1] == x.shape[1] else own

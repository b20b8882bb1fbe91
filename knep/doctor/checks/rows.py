"""What an answer depends on that it should not: other rows of the batch, later places of the sequence, chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from knep.doctor.checks.probe import Probe, functions
from knep.doctor.findings import Finding, diseases, finding
from knep.doctor.subject.any_batch import mapped, row_axis, tensors
from knep.doctor.subject.any_task import scores
from knep.doctor.subject.rng_isolation import undisturbed

_LEAST = 1e-4  # of the outputs' spread, above what other orders of summing give


def mixed(p: Probe) -> list[Finding]:
    """rows_mixed where another row in place of one changes the answers for the others, in eval mode."""
    z = p.scores
    if p.rows < 4 or z.ndim == 0 or row_axis(z, p.rows) is None or p.x is None:
        return []
    if not torch.allclose(p.again(p.batch), z, rtol=1e-4, atol=1e-6):
        return []  # chance: another check
    axis = row_axis(z, p.rows) or 0
    ill: dict[int, float] = {}
    for row in (1, p.rows - 2):
        changed = p.again(_swapped(p, row))
        if changed.shape != z.shape:
            return []
        others = [i for i in range(p.rows) if i != row]
        index = torch.tensor(others, device=z.device)
        moved = (changed - z).index_select(axis, index).abs().max()
        ill[row] = float(moved) / max(float(z.std(correction=0)), 1e-6 * float(z.abs().max()), 1e-30)
    if min(ill.values()) < _LEAST:
        return []
    text = f"in eval mode, another row {min(ill)} in the batch moves the answers for other rows by up to "
    text += f"{100 * max(ill.values()):.2g} % of their spread"
    mend, layers = _why(p)
    return [finding("rows_mixed", text, 0.97, layers=layers, mend=mend or diseases()["rows_mixed"].mend)]


def _swapped(p: Probe, row: int) -> Any:
    """The batch with another row's inputs, and noise, in place of one row's."""
    _, target = p.subject.parts(p.batch)
    kept = {id(t) for t in tensors(target)} if target is not p.inputs else set()

    def change(t: Tensor) -> Tensor:
        axis = row_axis(t, p.rows)
        if axis is None or id(t) in kept:
            return t
        new = t.clone().movedim(axis, 0)
        new[row] = new[(row + p.rows // 2) % p.rows]
        if t.is_floating_point():
            new[row] = 2 * new[row] + 0.5 * t.std(correction=0)
        return new.movedim(0, axis)

    return mapped(p.batch, change)


def _why(p: Probe) -> tuple[str, list[str]]:
    """(mend, layers) where a layer explains it."""
    for path, m in p.model.named_modules():
        first = getattr(m, "batch_first", None)
        if first is False and isinstance(m, (nn.RNNBase, nn.MultiheadAttention)):
            return f"give {path or 'the layer'} batch_first=True: it takes the batch for the steps of a sequence", [
                path
            ]
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.track_running_stats:
            return f"give {path} track_running_stats=True, or use group norm", [path]
        if isinstance(m, nn.Softmax) and m.dim == 0:
            return f"give {path} dim=-1: it goes over the batch", [path]
    return "", []


def future(p: Probe) -> list[Finding]:
    """sees_the_future where the answer at a place depends on the input that holds the target of that place;
    unshifted_targets where the target of a place is the input of that place."""
    x, y, z = p.x, p.y, p.scores
    if x is None or y is None or x.shape[:2] != y.shape[:2] or x.ndim < 2 or x.shape[1] < 4 or not p.judged:
        return []
    ahead = _shift(x, y)
    if ahead is None or (x.is_floating_point() and ahead == 0):
        return []
    length = x.shape[1]
    t = length // 2 if ahead < length // 2 else 1
    at = _aligned(p, y, z, t)
    if at is None or t + ahead >= length:
        return []
    axis, where = at
    changed = p.again(_moved_place(p, x, t + ahead))
    if changed.shape != z.shape:
        return []
    moved = (changed - z).abs().movedim(axis, 0)
    own, least = float(moved[where].max()), _LEAST * max(float(z.std(correction=0)), 1e-12)
    if own < least:
        return []
    if t + ahead == where:
        text = f"the target at place {t} is the input at place {t + ahead}, which the model reads there"
        return [finding("unshifted_targets", text, 0.96)]
    if t + ahead < where:
        return []
    text = f"the answer at place {where} is to be the input at place {t + ahead}, and changes when that input does"
    return [finding("sees_the_future", text, 0.97)]


def _shift(x: Tensor, y: Tensor) -> int | None:
    """How far ahead of a target's place the input lies that it repeats, None where it repeats none."""
    if x.is_floating_point() != y.is_floating_point():
        return None
    if x.is_floating_point():
        x, y = x.reshape(*x.shape[:2], -1), y.reshape(*y.shape[:2], -1)
        if x.shape[2] != y.shape[2]:
            x = x[..., : y.shape[2]] if x.shape[2] > y.shape[2] else x
        if x.shape != y.shape:
            return None
    elif x.shape != y.shape:
        return None
    for ahead in (1, 0, 2):
        part, wanted = x[:, ahead:], y[:, : x.shape[1] - ahead]
        counted = torch.ones_like(wanted, dtype=torch.bool) if y.is_floating_point() else wanted >= 0
        if int(counted.sum()) < 4 or len(wanted[counted].unique()) < 3:
            return None
        if float(((part == wanted) & counted).sum()) > 0.95 * int(counted.sum()):
            return ahead
    return None


def _aligned(p: Probe, y: Tensor, z: Tensor, t: int) -> tuple[int, int] | None:
    """(axis of the output that runs over places, the place whose scores the target at place t moves)."""
    other = y.clone()
    other[:, t] = y[:, t] + 1 if y.is_floating_point() else (y[:, t] + 1) % max(2, int(y.max()))
    try:
        changed = (p.slope(z, mapped(p.target, lambda v: other if v is y else v)) - p.slope(z)).abs()
    except Exception:  # a loss with its own demands
        return None
    for axis in range(1, z.ndim):
        if z.shape[axis] not in (y.shape[1], y.shape[1] - 1):
            continue
        places = changed.movedim(axis, 0).flatten(1).sum(1)
        hit = (places > 0.2 * places.max()).nonzero().flatten()
        if len(hit) == 1 and float(places.max()) > 0:
            return axis, int(hit[0])
    return None


def _moved_place(p: Probe, x: Tensor, place: int) -> Any:
    """The batch with other inputs at one place."""
    new = x.clone()
    new[:, place] = new[:, place] + 1 + x.std(correction=0) if x.is_floating_point() else x[:, place].roll(1, 0)
    if not x.is_floating_point():
        same = new[:, place] == x[:, place]
        new[same, place] = x[same, (place + 1) % x.shape[1]]
    return mapped(p.batch, lambda t: new if t is x else t)


def unstable(p: Probe) -> list[Finding]:
    """made_in_forward where a pass makes weights; random_in_eval where the answers in eval mode are drawn."""
    made: list[str] = []

    def seen(module: nn.Module, name: str, _: Any) -> None:
        made.append(f"{type(module).__name__}.{name}")

    from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameter

    outputs = []
    for seed in (1, 2):
        hook = on_parameter(seen) if seed == 2 else None  # lazy layers make theirs in the first pass
        try:
            with (
                torch.no_grad(),
                undisturbed(seed),
                functions({"dropout", "alpha_dropout", "feature_dropout"}) as calls,
            ):
                outputs.append(scores(p.subject.answer(p.model, p.batch)).double())
        finally:
            if hook is not None:
                hook.remove()
    a, b = outputs
    if made:
        kinds = ", ".join(dict.fromkeys(made))
        moved = (
            "" if a.shape != b.shape else f"; the same input gives another output, by {_far(a, b):.2g} of its spread"
        )
        return [finding("made_in_forward", f"each forward pass makes new weights, {kinds}{moved}", 0.98)]
    if a.shape != b.shape or not _far(a, b) >= 1e-3:  # NaN is another disease
        return []
    on = [args for _, args, kwargs, _ in calls if kwargs.get("training", args[2] if len(args) > 2 else True)]
    if on:
        text = f"dropout acts in eval mode: two passes of the same rows differ by {_far(a, b):.2g} of their spread"
        return [finding("random_in_eval", text, 0.9)]
    if (p.x is not None and p.y is p.x) or p.subject.task == "other":
        return []
    text = f"two passes of the same rows in eval mode differ by {_far(a, b):.2g} of their spread"
    return [finding("random_in_eval", text, 0.6 if _far(a, b) < 0.3 else 0.85)]


def _far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean()) / max(float(a.std(correction=0)), 1e-12)

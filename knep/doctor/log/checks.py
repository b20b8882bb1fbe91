"""What the curves of a run that has ended can tell: less than a look into it, and each with its place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from knep.doctor.findings import Finding, Report, finding, ranked
from knep.doctor.live.history import middle, spread
from knep.doctor.log.curves import Curves, Series, values
from knep.doctor.log.readers import finite
from knep.doctor.log.remedies import with_commands

_FEW = 4  # points of a curve that say something
_FLAT = 0.02  # of its height: a curve that moves less did not learn
_RISE = 1.5  # times its start: a curve above it diverged
_SPIKE = 12.0  # robust deviations above what came before
_WORSE = 1.25  # of the best validation: what overfits ends above it
_LAST = 0.25  # of a curve: its end


def examine(curves: Curves) -> Report:
    """The findings of a run's curves, the gravest first, each with what to try; what is no disease is a note."""
    found = [f for judge in (_not_finite, _diverged, _rate_ended) for f in judge(curves)]
    if not found:
        found = [f for judge in (_never_learned, _spikes, _overfits) for f in judge(curves)]
    if not any(f.gravity > 0.8 for f in found):
        found += [f for judge in (_still_falling, _noisy) for f in judge(curves)]
    ordered = ranked(with_commands(f, curves) for f in found)
    sound = f"nothing found in the curves of {curves.source}, which tell less than the run itself"
    most = max(len(curves.train), len(curves.val))
    few = f"{curves.source} has {most} point{'s' * (most != 1)} of a loss: log at least {_FEW}"
    report = Report(ordered, {"curves": curves.as_dict()}, notes=tuple(_notes(curves)), sound=sound, unit=curves.unit)
    return replace(report, unknown=few) if most < _FEW and not ordered else report


def _place(curves: Curves, x: float) -> str:
    return f"{curves.unit} {x:g}"


def _main(curves: Curves) -> Series:
    return curves.train if len(curves.train) >= _FEW else curves.val


def _not_finite(curves: Curves) -> Iterator[Finding]:
    named = ("training loss", curves.train), ("validation loss", curves.val), ("gradient's norm", curves.norm)
    for name, series in named:
        bad = [x for x, v in series if not math.isfinite(v)]
        if bad and (len(series) < 2 or bad[-1] == series[-1][0] or len(bad) > 0.1 * len(series)):
            before = [v for x, v in finite(series) if x < bad[0]]
            end = f" after {before[-1]:.3g}" if before else " from the first one on"
            lr = _rate_at(curves, bad[0])
            text = f"the {name} is NaN or infinite from {_place(curves, bad[0])} on,{end}{lr}"
            yield finding("not_finite", text, 0.95, int(bad[0]), **_lower(curves, bad[0]))
            return
    yield from _all_at_once_zero(curves)


def _all_at_once_zero(curves: Curves) -> Iterator[Finding]:
    """A loss that is exactly 0 from one point to the next: Hugging Face's Trainer writes 0 where it was NaN."""
    numbers = values(finite(curves.train))
    still = next((i for i, v in enumerate(reversed(numbers)) if v != 0), len(numbers))
    at = len(numbers) - still
    if still < 3 or not at or not numbers[at - 1] > 0.05 * numbers[0]:
        return
    began = finite(curves.train)[at][0]
    text = (
        f"the training loss is exactly 0 from {_place(curves, began)} on, after {numbers[at - 1]:.3g}: what a logger "
    )
    yield finding("not_finite", text + f"writes that leaves NaN out{_rate_at(curves, began)}", 0.9, int(began))


def _diverged(curves: Curves) -> Iterator[Finding]:
    series = finite(_main(curves))
    if len(series) < _FEW:
        return
    start, end = _height(series), middle(values(series)[-max(3, len(series) // 10) :])
    limit = start + (_RISE - 1) * abs(start) + 0.05 * _scale(series)
    if end > limit:
        numbers = values(series)
        below = max((i for i in range(len(series)) if middle(numbers[max(0, i - 1) : i + 2]) <= start), default=-1)
        began = next((x for x, v in series[below + 1 :] if v > start), series[-1][0])
        text = f"the loss goes from {start:.3g} to {end:.3g}, above its start from {_place(curves, began)} on"
        yield finding("lr_too_high", text + _rate_at(curves, began), 0.9, int(began), **_lower(curves, began))


def _never_learned(curves: Curves) -> Iterator[Finding]:
    """A loss that ends where it began: of means of epochs, the first may be behind most of the learning."""
    series = finite(_main(curves))
    if len(series) < 2 * _FEW:
        return
    numbers = values(series)
    part = max(3, len(numbers) // 5)
    start, end, noise = middle(numbers[:part]), middle(numbers[-part:]), spread(numbers[-part:])
    moved = max(start, middle(numbers[:3]), numbers[0]) - end
    accs = values(finite(curves.val_acc or curves.train_acc))
    learned = bool(accs) and (max(accs) - accs[0] > 0.1 or max(accs) > 0.7)
    if not any(numbers) and not learned:
        text = f"the loss is exactly 0 at all {len(numbers)} points: no row counts in it, or NaN was left out"
        yield finding("not_learning", text, 0.85, int(series[0][0]))
    if abs(moved) > _FLAT * abs(start) + noise or min(numbers) < 0.9 * start or learned or start <= 0:
        return
    text = f"the loss was {start:.4g} at first and is {end:.4g} at the end, over {len(numbers)} points"
    top = max(values(finite(curves.lr)), default=math.nan)
    swings = spread(numbers) > 0.1 * start
    text += f", at a learning rate of at most {top:.3g}" if math.isfinite(top) else ""
    ways = (f"optimizer.lr={top / 10:.1g}",), (f"optimizer.lr={top * 10:.1g}",)
    more: dict[str, Any] = {"overrides": ways[:1] if swings else ways[::-1]} if math.isfinite(top) and top > 0 else {}
    yield finding("not_learning", text, 0.85, int(series[0][0]), **more)


def _spikes(curves: Curves) -> Iterator[Finding]:
    series = finite(curves.train)
    if len(series) < 30:
        return
    leaps = []
    for i in range(15, len(series) - 1):
        before = values(series[i - 15 : i])
        wide = max(spread(before), 0.05 * abs(middle(before)), 1e-12)
        size = (series[i][1] - middle(before)) / wide
        if size > _SPIKE and series[i][1] > max(before) and series[i + 1][1] < series[i][1]:
            leaps.append((series[i][0], size))
    if len(leaps) >= 2 or any(size > 3 * _SPIKE for _, size in leaps):
        places = ", ".join(f"{x:g}" for x, _ in leaps[:5])
        far = max(size for _, size in leaps)
        text = f"the loss leaps at {curves.unit} {places}, up to {far:.0f} deviations above those before"
        yield finding("loss_spikes", text, 0.6, int(leaps[0][0]))


def _overfits(curves: Curves) -> Iterator[Finding]:
    val, train = finite(curves.val), finite(curves.train)
    if len(val) < _FEW + 1:
        return
    best = min(range(len(val)), key=lambda i: val[i][1])
    after = values(val[best + 1 :])
    if len(after) < 3 or val[best][1] <= 0:
        return
    end = middle(after[-3:])
    if not all(v > _WORSE * val[best][1] for v in after[-3:]) or not _climbs(values(val), best):
        return
    if len(train) >= _FEW:
        earlier = [v for x, v in train if x <= val[best][0]][-3:] or values(train[:3])
        if middle(values(train[-5:])) > middle(earlier):
            return  # the training loss rises too: another disease
    accs = values(finite(curves.val_acc))
    if accs and middle(accs[-3:]) > 0.97 * max(accs):
        return  # surer answers of the same classes
    fit = f", while the training loss goes on to {train[-1][1]:.3g}" if train else ""
    then = f"{val[best][1]:.3g} at {_place(curves, val[best][0])}"
    text = f"the validation loss was {then} and is {end:.3g} at the end{fit}"
    yield finding("overfitting", text, 0.75, int(val[best][0]))


def _climbs(numbers: Sequence[float], best: int) -> bool:
    """Whether a curve rises behind its best point by more than its neighbours differ, as a swinging one does not."""
    late = numbers[best:]
    half = len(late) // 2
    swing = spread([b - a for a, b in itertools.pairwise(numbers[len(numbers) // 4 :])]) / math.sqrt(2)
    bottom = middle(numbers[max(0, best - 2) : best + 3])
    top = middle(late[-max(3, len(late) // 4) :])
    return top - bottom > 2 * swing and top >= middle(late[: max(2, half)])


def _still_falling(curves: Curves) -> Iterator[Finding]:
    """Ends while validation falls as fast as before, at a rate that has not come to its end."""
    series = finite(curves.val if len(curves.val) >= 2 * _FEW else curves.train if not curves.val else [])
    if len(series) < 2 * _FEW:
        return
    numbers, part = values(series), max(3, int(_LAST * len(series)))
    total, last = numbers[0] - min(numbers), middle(numbers[-2 * part : -part]) - middle(numbers[-part // 2 - 1 :])
    falls = sum(b < a for a, b in zip(numbers[-part - 1 : -1], numbers[-part:], strict=True))
    rates = values(finite(curves.lr))
    decayed = bool(rates) and rates[-1] < 0.2 * max(rates)
    if total > 0 and last > 0.15 * total and falls >= 0.8 * part and not decayed and numbers[-1] > 0:
        share = last / total
        text = (
            f"over the last quarter the loss still fell by {share:.0%} of all it fell, to {numbers[-1]:.3g} at the end"
        )
        mend = "train for twice as many epochs"
        yield finding("stopping_too_early", text, 0.45, int(series[-part][0]), certain=False, mend=mend)


def _rate_ended(curves: Curves) -> Iterator[Finding]:
    """A schedule that was over long before the run, while the loss was still on its way."""
    rates, train = finite(curves.lr), finite(_main(curves))
    if len(rates) < 2 * _FEW or len(train) < 2 * _FEW:
        return
    top = max(values(rates))
    alive = max((i for i, (_, v) in enumerate(rates) if v > 0.01 * top), default=0)
    first, last = rates[0][0], rates[-1][0]
    gone = rates[min(alive + 1, len(rates) - 1)][0]
    if top <= 0 or last <= first or (gone - first) > 0.4 * (last - first):
        return
    until = [v for x, v in train if x <= gone]
    behind = [v for x, v in train if x > gone]
    if len(behind) < _FEW or (until and middle(behind) < 0.1 * until[0]):
        return
    text = f"the learning rate fell below a hundredth of its {top:.3g} at {_place(curves, gone)}, of {last:g} in all"
    yield finding("rate_ended_early", text, 0.7, int(gone))


def _noisy(curves: Curves) -> Iterator[Finding]:
    val = finite(curves.val)
    if len(val) < 3 * _FEW:
        return
    numbers = values(val)
    late = numbers[len(numbers) // 2 :]
    swings = spread([b - a for a, b in itertools.pairwise(late)]) / math.sqrt(2)
    worst = sum(b > 1.5 * a for a, b in itertools.pairwise(late))
    if middle(late) > 0 and swings > 0.3 * middle(late) and worst >= 2:
        text = f"from one validation to the next its loss swings by {swings / middle(late):.0%} in the second half"
        yield finding("noisy_validation", text, 0.4, int(val[len(numbers) // 2][0]), certain=False)


def _notes(curves: Curves) -> Iterator[str]:
    """What is worth a sentence and no disease."""
    val, train = finite(curves.val), finite(curves.train)
    if not curves.val:
        yield "no validation loss was logged: overfitting cannot be seen"
    if not curves.lr:
        yield "no learning rate was logged: schedules cannot be seen"
    if len(val) >= _FEW and len(train) >= _FEW and 0 < middle(values(val[-3:])) < 0.6 * middle(values(train[-3:])):
        yield (
            f"validation loss ({val[-1][1]:.3g}) is far below that of training ({train[-1][1]:.3g}): dropout, "
            "smoothing or augmentation do that, and so do rows that are in both splits; the run itself can tell"
        )
    if len(val) >= 3 * _FEW:
        numbers = values(val)
        floor = min(numbers) + 0.01 * (max(numbers) - min(numbers))
        reached = next(i for i, v in enumerate(numbers) if v <= floor)
        if reached < 0.5 * len(numbers):
            where = _place(curves, val[reached][0])
            yield f"no validation behind {where} is better by 1 %: the rest of the run may be saved"


def _height(series: Sequence[tuple[float, float]]) -> float:
    """The loss at the start, at most the median of the first five."""
    return min(series[0][1], middle([v for _, v in series[:5]]))


def _scale(series: Series) -> float:
    numbers = values(series)
    return max(numbers) - min(numbers)


def _rate_at(curves: Curves, x: float) -> str:
    known = [v for at, v in finite(curves.lr) if at <= x] or values(finite(curves.lr))[:1]
    return f", at a learning rate of {known[-1]:.3g}" if known else ""


def _lower(curves: Curves, x: float) -> dict[str, Any]:
    known = [v for at, v in finite(curves.lr) if at <= x] or values(finite(curves.lr))[:1]
    top = max(known, default=0.0)
    mend = "train again with a tenth of the learning rate, or with the gradient's norm clipped to 1"
    return {"overrides": ((f"optimizer.lr={top / 10:.1g}",), ("clip=norm",))} if top > 0 else {"mend": mend}

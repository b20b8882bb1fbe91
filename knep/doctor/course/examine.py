"""What a short training tells of a subject of any task: beside baselines, and beside itself under a remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from knep.doctor.checks.gradients import examined_pass
from knep.doctor.course.baselines import baselines
from knep.doctor.course.imbalance import neglected
from knep.doctor.course.own_targets import places_alone, turned
from knep.doctor.course.signals import model_signals
from knep.doctor.course.skill import stacked_answers
from knep.doctor.course.trial import Changed, Course, Remedy, steps_of, train
from knep.doctor.findings import Finding, diseases, finding
from knep.doctor.findings import named as listed
from knep.doctor.model.gradient_flow import owner
from knep.doctor.subject.any_batch import first
from knep.doctor.subject.any_task import Subject
from knep.doctor.subject.rng_isolation import undisturbed
from knep.doctor.trials.examination import BEARABLE

_GAIN = 0.15  # of skill that a remedy must bring
_SHARE = 0.6  # of the best gain, which makes what the numbers themselves show the better explanation
_GOOD = 0.8  # of what baselines reach
_NOTHING = 0.03
_STRONG, _BRIEF = 0.05, 1e-3  # weight decay, and with the rate, that may be too much
_MUCH = 0.5  # of skill: a gain that tells though little is reached, as in another unit than the target's


@dataclass(frozen=True)
class Way:
    """A remedy: what it would name, what shows it beforehand ("" for a guess), and the training that tells."""

    disease: str
    evidence: str
    remedy: Remedy
    what: str
    mend: str = ""


def course_findings(subject: Subject) -> tuple[list[Finding], dict[str, Any]]:
    """(findings, what was measured as plain data) of a trial, with trials of remedies where it lags behind."""
    steps = steps_of(subject)
    base = train(subject, steps)
    simple = baselines(subject)
    signs = _signs(subject)
    expected = max([0.0, *simple.values()])
    measured: dict[str, Any] = {
        "task": subject.task,
        "baselines": simple,
        "trial": {"steps": steps, "losses": base.losses, "reached": base.reached, "train": base.train, "val": base.val},
    }
    spoilt = _not_finite(subject, base)
    if spoilt:
        return spoilt, measured
    inverted = turned(subject, base)
    if inverted:
        return inverted, measured
    found = neglected(subject, base, steps) + [f for f in signs if f.certain and f.disease not in BEARABLE]
    found += [] if signs else _without_slope(subject, base)
    found += places_alone(subject, base)
    if not _lags(base, expected):
        return found + _overfits(base), measured
    if any(f.gravity > 0.8 for f in found):
        return found, measured
    tried = _tried(subject, base, steps, expected)
    measured["tried"] = [[way.disease, way.what, round(gain, 4)] for way, gain, _ in tried]
    best = _explained(base, tried, expected)
    borne = [replace(f, gravity=0.85 * f.gravity) for f in signs if f.gravity >= 0.5 and f not in found]
    if best or (borne and expected > 0.2):
        return [*found, *best, *borne], measured
    named = found + (_unrelated(subject, base, tried, simple) or _overfits(base))
    return named or _unexplained(subject, base, simple), measured


def _lags(base: Course, expected: float) -> bool:
    if base.diverged:
        return True
    return base.reached < min(0.9, max(0.3, _GOOD * expected) if expected > _NOTHING else 0.5)


def _not_finite(subject: Subject, base: Course) -> list[Finding]:
    """A step of the trial whose gradient was NaN though its loss was finite."""
    if not base.diverged or base.model is None or len(base.losses) < 2:
        return []
    seen = base.losses[-2]
    if not math.isfinite(seen) or abs(seen) > 1e4 * (1 + abs(base.losses[0])):
        return []  # it grew first: the rate
    model = subject.copy(training=True)
    optimizer: Any = subject.make_optimizer(model)
    start = _size(model)
    for batch in subject.train[:40]:
        if not _size(model) < 100 * (1 + start):
            return []  # the weights grew first: the rate, or the size of the numbers
        found = examined_pass(subject, model, batch, "a batch of the trial")
        if found:
            return found
        optimizer.zero_grad()
        subject.passed(model, batch)[1].backward()
        optimizer.step()
    return []


def _size(model: nn.Module) -> float:
    return float(sum(p.detach().double().square().sum() for p in model.parameters()) ** 0.5)


def _without_slope(subject: Subject, base: Course) -> list[Finding]:
    """cut_off: layers whose gradient is exactly zero after the trial, as of what is multiplied by 0."""
    if base.model is None or base.diverged:
        return []
    model = base.model.train()
    moved: dict[str, bool] = {}
    with undisturbed(subject.seed):
        for batch in subject.train[:4]:
            model.zero_grad()
            _, loss = subject.passed(model, batch)
            if not loss.requires_grad:
                return []
            loss.backward()
            for name, p in model.named_parameters():
                if p.grad is not None and p.ndim > 1:
                    moved[name] = moved.get(name, False) or bool(p.grad.count_nonzero())
    model.zero_grad()
    still = [name for name, moves in moved.items() if not moves]
    if not still or len(still) == len(moved):
        return []
    text = (
        f"the gradient of {listed([owner(n) or n for n in still])} is exactly zero for every row, also after the trial"
    )
    return [finding("cut_off", text, 0.9, layers=still)]


def _signs(subject: Subject) -> list[Finding]:
    """What a pass shows; nothing where it cannot be made for this form of model."""
    try:
        return model_signals(subject)
    except Exception:  # another's model may ask for what only its own loop gives
        return []


def _tried(subject: Subject, base: Course, steps: int, expected: float) -> list[tuple[Way, float, Course]]:
    """Trials of the remedies, until one leaves nothing to explain; far higher rates only where nothing moves."""
    tried: list[tuple[Way, float, Course]] = []
    for way in _ways(subject):
        course = train(subject, steps, way.remedy)
        tried.append((way, course.reached - base.reached, course))
        if course.reached > max(0.9, 0.95 * expected) and not way.evidence:
            break
    for rate in _far_rates(base, tried, expected):
        way = _rate(rate)
        course = train(subject, steps, way.remedy)
        tried.append((way, course.reached - base.reached, course))
        if course.reached > 0.3:
            break
    return tried


def _far_rates(base: Course, tried: list[tuple[Way, float, Course]], expected: float) -> tuple[float, ...]:
    """Rates still to be tried where nothing was learned: lower ones of what diverged, far higher ones of what stood."""
    if max(base.reached, *(c.reached for _, _, c in tried)) > max(0.2, 0.6 * expected):
        return ()
    if base.diverged or (base.losses and max(base.losses[:20]) > 3 * (1 + abs(base.losses[0]))):
        return (0.01, 0.001)
    higher = tried[-1][2]
    stood = not higher.diverged and higher.train < max(0.1, 0.6 * expected)
    return (1e3, 1e4, 1e5) if stood and higher.losses[-1] > 0.8 * base.losses[0] > 0 else ()


def _rate(rate: float) -> Way:
    disease = "lr_too_high" if rate < 1 else "lr_too_low"
    return Way(disease, "", Remedy(rate=rate), f"the rate times {rate:g}", f"a learning rate of {rate:g} times yours")


def scale_at_fault(subject: Subject, found: list[Finding]) -> list[Finding]:
    """The findings, with unscaled_inputs before a NaN that scaled inputs do not give."""
    if not any(f.disease in ("nan_loss", "nan_gradient") for f in found):
        return found
    for way in _of_inputs(subject):
        model = Changed(subject.copy(training=True), way.remedy)
        for batch in subject.train[:8]:
            subject.passed(model, batch)[1].backward()
        if all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
            ill = next(f.evidence for f in found if f.disease in ("nan_loss", "nan_gradient"))
            scaled = finding(
                "unscaled_inputs", f"{way.evidence}; {ill}; standardised, all is finite", 0.99, mend=way.mend
            )
            return [scaled, *(replace(f, gravity=0.6) for f in found)]
    return found


def _ways(subject: Subject) -> Iterator[Way]:
    inputs, targets = list(_of_inputs(subject)), list(_of_targets(subject))
    yield from inputs
    yield from targets
    shares = [m.p for m in subject.model.modules() if isinstance(m, _DropoutNd)]
    if shares and max(shares) > 0.5:
        text = f"layers of dropout leave out up to {max(shares):.3g} of what passes"
        yield Way("too_much_dropout", text, Remedy(dropout=0.0), "no dropout", "a share of 0.1 to 0.5, or none")
    decay, taken_off = _decay(subject)
    if decay >= _STRONG or taken_off > _BRIEF:
        text = f"a weight decay of {decay:.3g}, which takes {taken_off:.2g} off the weights in a step"
        mend = "a weight decay of 1e-4 to 1e-2"
        yield Way("weight_decay_too_large", text, Remedy(decay=0.0), "no weight decay", mend)
    for a in inputs:
        for b in targets:
            both = Remedy(inputs=a.remedy.inputs, output=b.remedy.output)
            yield Way(a.disease, f"{a.evidence}; {b.evidence}", both, "inputs and targets standardised", a.mend)
    for rate in (0.1, 10.0, 100.0):
        yield _rate(rate)


def _decay(subject: Subject) -> tuple[float, float]:
    """The largest weight decay of a group, and times its learning rate."""
    groups: Any = subject.make_optimizer(subject.copy()).param_groups
    found = [(float(g.get("weight_decay") or 0.0), float(g.get("lr") or 0.0)) for g in groups]
    return max((d for d, _ in found), default=0.0), max((d * rate for d, rate in found), default=0.0)


def _of_inputs(subject: Subject) -> Iterator[Way]:
    seen = subject.stacked("train")
    if seen is None or not seen[0].is_floating_point() or not isinstance(subject.parts(subject.train[0])[0], Tensor):
        return
    x = seen[0].double()
    axes = [0] if x.ndim == 2 else [0, *range(2, x.ndim)] if x.ndim == 4 else list(range(x.ndim - 1))
    mean, size = x.mean(axes, keepdim=True)[0], x.std(axes, correction=0, keepdim=True)[0].clamp(min=1e-9)
    top, low = float(size.max()), float(size[size > 1e-8].min()) if bool((size > 1e-8).any()) else 1.0
    away = float((mean.abs() / size).median())
    odd = top > 5 or top < 0.2 or top / low > 30 or away > 5
    if not odd:
        return
    text = f"the columns of the inputs have deviations from {low:.3g} to {top:.3g} and means up to "
    text += f"{float(mean.abs().max()):.3g}"
    m, s = mean.float(), torch.where(size > 1e-8, size, 1.0).float()
    remedy = Remedy(inputs=lambda t: (t - m.to(t)) / s.to(t))
    mend = "standardise the inputs, (x - mean) / std of the training split, column by column"
    yield Way("unscaled_inputs", text, remedy, "inputs standardised", mend)


def _of_targets(subject: Subject) -> Iterator[Way]:
    seen = subject.stacked("train")
    if subject.task != "regression" or seen is None or not isinstance(subject.parts(subject.train[0])[1], Tensor):
        return
    y = seen[1].double()
    mean, size = y.mean(0), y.std(0, correction=0).clamp(min=1e-9)
    top, low, away = float(size.max()), float(size.min()), float((mean.abs() / size).max())
    if not (top > 5 or low < 0.2 or away > 3):
        return
    text = f"the targets have deviations from {low:.3g} to {top:.3g} and means up to {float(mean.abs().max()):.3g}"
    remedy = Remedy(output=(mean.float(), size.float()))
    yield Way("target_scale", text, remedy, "targets standardised")


def _explained(base: Course, tried: list[tuple[Way, float, Course]], expected: float) -> list[Finding]:
    """The remedy that gains most; one whose reason the numbers show before a mere change of the rate."""
    if not tried:
        return []
    top = max(gain for _, gain, _ in tried)
    reached = base.reached + top
    least = max(_GAIN, 0.3 * (max(expected, reached) - base.reached))
    if top < least or (reached < 0.1 and top < _MUCH):
        return []
    fit = [(way, gain) for way, gain, _ in tried if gain >= max(least, _SHARE * top)]
    fit.sort(key=lambda pair: (not pair[0].evidence, -pair[1]))
    if base.falls and not base.diverged and fit[0][0].disease == "lr_too_low" and base.reached > 0.3:
        return []  # it goes on learning
    made: dict[str, Finding] = {}
    for way, gain in fit:
        text = f"{way.evidence}; " if way.evidence else ""
        text += f"a trial of {len(base.losses)} steps explains {_part(base.reached)}, and "
        text += f"{_part(base.reached + gain)} with "
        text += f"{way.what}" + (f"; simple methods reach {_part(expected)}" if expected > 0 else "")
        gravity = 0.9 if not made else 0.4
        made.setdefault(way.disease, finding(way.disease, text, gravity, mend=way.mend or diseases()[way.disease].mend))
    return list(made.values())


def _part(skill: float) -> str:
    return "nothing" if skill <= 0 else f"{100 * skill:.3g} %"


def _unexplained(subject: Subject, base: Course, simple: dict[str, float]) -> list[Finding]:
    """not_learning where a training that has come to rest is far behind simple methods, for no known reason."""
    expected = max(simple.values(), default=0.0)
    if expected < 0.5 or max(base.reached, base.train) > 0.3 * expected or base.falls or base.rises:
        return []
    if base.model is None or stacked_answers(subject, base.model, subject.train[:1])[0] is None:
        return []  # an answer in another form than the target, as a mean and a deviation
    name = max(simple, key=lambda k: simple[k])
    text = f"a trial of {len(base.losses)} steps explains {_part(base.reached)}, {name} {_part(expected)}; "
    text += "neither other rates nor scales mend it, and its loss went from "
    text += f"{base.losses[0]:.3g} to {base.losses[-1]:.3g}"
    mend = "look at the loss, which may be lowest for other answers than the targets, and at the model's last layer"
    return [finding("not_learning", text, 0.7, mend=mend)]


def _unrelated(
    subject: Subject, base: Course, tried: list[tuple[Way, float, Course]], simple: dict[str, float]
) -> list[Finding]:
    """Where neither simple methods nor any trial find anything that carries over."""
    reached = max([base.reached, *(c.reached for _, _, c in tried)])
    rows = sum(subject.rows(b) for b in subject.train)
    held = sum(subject.rows(b) for b in subject.val)
    chance = (2.0 if subject.task in ("binary", "multilabel") else 1.0) / math.sqrt(max(1, held))
    if not simple or max(simple.values()) > _NOTHING + chance or reached > _NOTHING + chance:
        return []
    y = first(subject.parts(subject.train[0])[1])
    places = subject.task in ("segmentation", "tokens", "tagging")
    if rows < (60 if places else 200) or y is None or subject.task == "other":
        return []
    names = ", ".join(f"{name} {100 * value:.2g} %" for name, value in simple.items())
    text = f"of validation, {names} and a trial {100 * max(reached, 0):.2g} % is explained, from {rows} rows; "
    text += f"of its own rows the trial explains {_part(base.train)}"
    return [finding("unrelated_labels", text, 0.9 if places or rows >= 400 else 0.6)]


def _overfits(base: Course) -> list[Finding]:
    if len(base.val_losses) < 3 or base.diverged:
        return []
    least = min(base.val_losses)
    rise = base.val_losses[-1] / least if least > 0 else 1.0
    gap = base.train - base.reached
    nothing = base.reached < 0.3 and gap > 0.5
    if base.train < 0.8 or gap < 0.25 or (rise < 1.3 and not nothing):
        return []
    text = f"the trial explains {_part(base.train)} of training and {_part(base.reached)} of "
    text += "validation, whose loss ended at "
    text += f"{rise:.3g} times its lowest"
    mend = "more rows, a smaller net, weight decay, dropout, or stop where the validation loss is lowest"
    return [finding("overfitting", text, 0.7, mend=mend)]

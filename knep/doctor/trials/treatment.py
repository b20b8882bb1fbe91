"""Second trials: of each suspicion without what is suspected, and of other rates, schedules and lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from statistics import fmean
from typing import Any

from knep.doctor.findings import Finding, finding
from knep.doctor.model.rectified import unrectified
from knep.doctor.subject.setup import Patient
from knep.doctor.trials import remedies
from knep.doctor.trials.examination import BEARABLE, GAIN, LEARNED, SIGNAL, Examination
from knep.doctor.trials.lr_range import rate_range
from knep.doctor.trials.remedies import Treatment, applied, by_lines, prescribed, rate
from knep.doctor.trials.run import Trial, run
from knep.doctor.trials.scoring import Score, norms_of
from knep.doctor.trials.suspects import Suspect, group_values, suspects

_GOOD = 0.985  # accuracy from which on nothing is left to gain
_FEW = 60  # steps that hardly any run can do with
_MOST = 6  # suspicions, the gravest
_SWING = 0.05  # that validation accuracy falls below what it was, beyond what chance makes of it
_OF_RATE = 3  # trials that are kept for other rates and schedules


def treat(exam: Examination, suspected: list[Suspect], measured: dict[str, Any]) -> None:
    """Tries what could mend the patient, and notes what did in `exam.treated`; nothing where all is learned."""
    if exam.arrived < _GOOD:
        _treat(exam, suspected)
        if exam.base.train.acc < LEARNED:
            _treat_rate(exam, measured)
        elif _luck(exam):
            _treat_decay(exam)
        _treat_length(exam)
    measured["remedies"] = [list(row) for row in exam.tried]


def suspected_of(exam: Examination) -> list[Suspect]:
    """All suspicions, those of the model and the data with their remedies, the gravest first."""
    seen = {f.disease: f.gravity for f in exam.findings}
    mine = [
        replace(s, finding=replace(s.finding, gravity=max(s.finding.gravity, seen.get(s.finding.disease, 0.0))))
        for s in suspects(exam.patient, exam.base)
    ]
    named = {s.finding.disease for s in mine}
    for f in exam.findings:
        if (not f.certain or f.disease in BEARABLE) and f.disease not in named:
            mine.append(Suspect(f, tuple(_ways(exam.patient, f))))
    return sorted(mine, key=lambda s: -s.finding.gravity)


def _ways(patient: Patient, finding: Finding) -> list[Treatment]:
    group_norm = by_lines("norm=group")
    if finding.disease == "dying_relu" and finding.mend:
        return [((), unrectified)]
    if finding.disease in SIGNAL:
        return remedies.inits(patient)
    if finding.disease == "tiny_norm_batches":
        return [by_lines("data.batch_size=64"), group_norm]
    if finding.disease == "stale_statistics":
        slow = any(m.momentum != 0.1 for m in norms_of(patient.model))  # else there is nothing for the lines to change
        lines, lively = by_lines("norm=batch", "norm.momentum=0.1")
        return [(lines if slow else group_norm[0], lively), group_norm]
    return list(prescribed(finding.disease))


def _treat(exam: Examination, suspected: list[Suspect]) -> None:
    """A trial for each suspicion, the gravest first; the first of its ways that mends it is enough."""
    for suspect in suspected[:_MOST]:
        best, lines, cured = -math.inf, (), exam.patient
        for way, remedy in suspect.ways:
            treated = applied(remedy, exam.patient)
            if treated is None:
                continue
            if exam.left <= _OF_RATE:
                break
            gain = exam.gain(treated, suspect.finding.disease, " ".join(way))
            if gain > best:
                best, lines, cured = gain, way, treated
            if gain >= max(
                exam.least(suspect.finding.disease, suspect.finding.gravity), 0.5 * (exam.expected - exam.reached)
            ):
                break
        best = exam.lasting(cured, suspect.finding.disease, " ".join(lines), best, suspect.finding.gravity)
        if best:
            others = [way for way, _ in suspect.ways if way != lines]
            exam.treated.append((replace(suspect.finding.prescribed(lines, *others), gain=100 * best), best))


def _treat_rate(exam: Examination, measured: dict[str, Any]) -> None:
    """Other learning rates, and a decay of it."""
    patient, base = exam.patient, exam.base
    curve = measured["range"] = rate_range(patient)
    stretch = max(1.0, patient.total_steps / exam.steps)
    for disease, factors in (("lr_too_high", _lower(exam)), ("lr_too_low", _higher(curve))):
        gain, factor = _best_rate(exam, disease, factors)
        if disease == "lr_too_low" and factors[-1] > 1000 and gain < exam.least(disease):
            gain, factor = _best_rate(exam, disease, [factors[1] / 10])  # the range test's end may be too high by much
        if disease == "lr_too_low" and factor <= 3 * stretch and stretch > 1.5:
            continue  # the run itself is as much longer than the trial
        gain = exam.lasting(rate(factor)(patient), disease, f"rate x {factor:g}", gain)
        if gain:
            exam.treated.append((_rate_finding(patient, base, curve, disease, factor, gain), gain))
    _treat_decay(exam)


def _treat_decay(exam: Examination) -> None:
    """A rate that falls, where it stays high to the end."""
    base = exam.base
    if not base.rates or min(base.rates[-3:]) <= 0.5 * max(base.rates) or base.diverged:
        return
    lucky = _luck(exam)
    gain = exam.gain(remedies.decay(exam.patient), "no_decay", "scheduler=cosine") + lucky
    gain = exam.lasting(remedies.decay(exam.patient), "no_decay", "scheduler=cosine", gain)
    if not gain:
        return
    evidence = f"the rate is {base.rates[-1]:.3g} to the end; falling to 0 it reaches {100 * gain:.1f} points more"
    if lucky:
        course = ", ".join(f"{s.acc:.2f}" for _, s in _late(base))
        evidence += f" than this run does on average, whose validation accuracy swings ({course})"
    # Where the same rate does as well once it falls, it is not too high.
    lower = max((g for f, g in exam.treated if f.disease == "lr_too_high"), default=0.0)
    gravity = 0.6 if exam.reached > 0.8 * exam.expected and gain > 0.8 * lower else 0.45
    exam.treated.append((finding("no_decay", evidence, gravity, certain=False, gain=100 * gain), gain))


def _late(trial: Trial) -> list[tuple[int, Score]]:
    return trial.curve[len(trial.curve) // 2 :]


def _luck(exam: Examination) -> float:
    """Accuracy by which a validation that swings to the end happened to end above its mean; 0 where it does not swing.

    Early stopping keeps the best epoch, so that luck is no luck there.
    """
    late, learned = (
        [s.acc for _, s in part] for part in (_late(exam.base), exam.base.curve[len(exam.base.curve) // 4 :])
    )
    seen = sum(len(y) for _, y in exam.patient.val)
    if exam.patient.stopping or len(late) < 3 or not seen:
        return 0.0
    mean = fmean(late)
    noise = math.sqrt(mean * (1 - mean) / seen)
    fall = max(top - acc for top, acc in zip(accumulate(learned, max), learned, strict=True))
    if fall < _SWING + 2 * noise:
        return 0.0
    return 0.5 * max(0.0, late[-1] - mean)


def _best_rate(exam: Examination, disease: str, factors: list[float]) -> tuple[float, float]:
    """The largest gain and its factor, of equals the one nearest to 1."""
    rows = [(exam.gain(rate(f)(exam.patient), disease, f"rate x {f:g}"), f) for f in factors]
    return max(rows, key=lambda row: (row[0], -abs(math.log10(row[1]))))


def _lower(exam: Examination) -> list[float]:
    return [0.1, 0.01, 0.001] if exam.base.diverged or exam.arrived < 0.5 * exam.expected else [0.1]


def _higher(curve: Mapping[str, Any]) -> list[float]:
    """Ten times, and the two powers of ten up to where the range test's loss is lowest."""
    losses = [loss if math.isfinite(loss) else math.inf for loss in curve["losses"]]
    lowest = curve["factors"][losses.index(min(losses))] if losses else 1.0
    power = math.floor(math.log10(max(lowest, 1.0)) + 0.2)
    return [10.0, *(10.0**k for k in (power - 1, power) if k > 1)]


def _rate_finding(
    patient: Patient, base: Trial, curve: Mapping[str, Any], disease: str, factor: float, gain: float
) -> Finding:
    lr = max(base.rates, default=0.0)
    own = patient.option("optimizer").get("lr") or max(group_values(patient, "lr"), default=lr)
    end = "diverged" if base.diverged else f"ended at loss {base.losses[-1]:.3g} (from {base.losses[0]:.3g})"
    evidence = (
        f"at rate {own:.3g} the trial {end}; {factor:g} times it reaches {100 * gain:.1f} points more{_takeoff(curve)}"
    )
    gravity = 0.6 if base.diverged else 0.5
    ways = ((f"optimizer.lr={own * factor:.3g}",),)
    return finding(disease, evidence, gravity, certain=False, gain=100 * gain, overrides=ways)


def _takeoff(curve: Mapping[str, Any]) -> str:
    losses = curve.get("losses") or []
    if len(losses) < 10:
        return ""
    least = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    return f"; in the range test the loss is lowest near rate {curve['rates'][least]:.2g}"


def _treat_length(exam: Examination) -> None:
    """Whether the run is simply too short: only where the trial is the whole of it."""
    patient = exam.patient
    if patient.total_steps > exam.steps or exam.base.diverged:
        return
    steps = min(4 * exam.steps, 900)
    longer = run(remedies.longer(4)(patient), steps)
    # Training images are memorised in time whatever the trouble is: validation alone counts.
    gain = longer.val.acc - exam.base.val.acc
    exam.tried.append(("stopping_too_early", f"{steps} steps", round(gain, 4)))
    short = exam.steps < _FEW or patient.epochs <= 2
    if gain >= (GAIN if short else exam.least("stopping_too_early")):
        evidence = (
            f"the run is {exam.steps} steps long and ends at accuracy {exam.base.val.acc:.2f}; "
            f"{steps} steps reach {100 * gain:.1f} points more"
        )
        ways = ((f"trainer.max_epochs={4 * patient.epochs}",),)
        gravity = 0.6 if short else 0.45
        found = finding("stopping_too_early", evidence, gravity, certain=False, gain=100 * gain, overrides=ways)
        exam.treated.append((found, gain))

"""The examination: from cheap to dear, each part stopping where it is sure.

    data -- one pass at the start -- trial -- suspects, each with a second trial without it -- report

Certain findings are bugs and always reported. A suspicion is reported where the same training without it does better:
a cause is what a remedy mends.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from knep.doctor import remedies
from knep.doctor.course import Suspect, broken_images, group_values, suspects, trial_steps, without_outliers
from knep.doctor.data import data_findings, data_seen
from knep.doctor.findings import Finding, Report, ordered
from knep.doctor.patient import Patient
from knep.doctor.probes import memorised, rate_range
from knep.doctor.reference import reference
from knep.doctor.remedies import Remedy, applied, rate
from knep.doctor.signals import signals
from knep.doctor.structure import model_findings
from knep.doctor.trial import Trial, recalls, run, steps_of, stopped
from knep.errors import InputError

# What leaves nothing to examine behind it.
_FATAL = {"non_finite_inputs", "constant_inputs", "constant_labels", "labels_out_of_range"}
# What some networks bear: reported only where the training suffers.
_BEARABLE = {
    "unscaled_inputs", "vanishing_gradient", "exploding_gradient", "dying_relu", "saturation", "signal_collapse",
    "tiny_norm_batches", "stale_statistics", "precision_underflow", "too_little_capacity",
}  # fmt: skip
_SIGNAL = {"vanishing_gradient", "exploding_gradient", "dying_relu", "saturation", "signal_collapse"}
_GAINS = Path(__file__).with_name("gains.json")
_GOOD = 0.985  # accuracy from which on nothing is left to gain
_FEW = 60  # steps that hardly any run can do with
_LEARNED = 0.97  # accuracy on training images from which on no other rate or schedule is needed
_GAIN = 0.025  # of accuracy that a remedy must bring
_LITTLE = 0.015  # the same, where the evidence alone is strong
_SHARE = 0.6  # of the best remedy's gain that makes another one as good an explanation


@lru_cache
def healthy_gains() -> dict[str, float]:
    """Disease -> the most that its remedy gained, as accuracy, in a healthy run of the clinic's half A.

    Written by `scripts/healthy_gains.py`.
    """
    return json.loads(_GAINS.read_text(encoding="utf-8"))["largest"]


@dataclass
class Examination:
    """What is known so far. treated: findings that a remedy bore out, with its gain; tried: every remedy's."""

    patient: Patient
    steps: int
    base: Trial
    reached: float
    expected: float
    findings: list[Finding] = field(default_factory=list)
    treated: list[tuple[Finding, float]] = field(default_factory=list)
    tried: list[tuple[str, str, float]] = field(default_factory=list)

    def least(self, disease: str, gravity: float = 0.0) -> float:
        """The gain that counts: more than the same remedy brings to healthy runs, and a share of what is missing, since
        near chance accuracy is mostly noise. gravity: of the evidence; where it is strong, less will do.
        """
        usual = 1.25 * healthy_gains().get(disease, 0.0)
        return max(_LITTLE if gravity >= 0.75 else _GAIN, usual, 0.15 * (self.expected - self.reached))

    def gain(self, patient: Patient, disease: str, what: str) -> float:
        """What a trial of the treated patient reaches more than the first one; it is noted as tried."""
        try:
            gain = reached(run(patient, self.steps), patient) - self.reached
        except (InputError, RuntimeError):  # the remedy does not fit this model
            gain = -self.reached
        self.tried.append((disease, what, round(gain, 4)))
        return gain


def diagnose(patient: Patient, *, told: Callable[[str], None] | None = None) -> Report:
    """Examines a patient and reports what keeps it from learning. told: called with what is being looked at.

    Raises InputError for a model that fails on its data.
    """
    began = time.perf_counter()
    tell = told or (lambda _: None)
    tell("data")
    # A few broken images would make the statistics of the whole split strange: they are a disease of their own.
    found = data_findings(without_outliers(patient) if broken_images(patient) else patient)
    measured: dict[str, Any] = {"data": data_seen(patient)}
    if any(f.certain and f.disease in _FATAL for f in found) or _strange_labels(patient):
        return _report(found, measured, began)
    tell("signals")
    seen = signals(patient)
    measured["signals"] = _drawn(seen.as_dict())
    found += model_findings(patient, seen)
    tell("trial")
    steps = steps_of(patient)
    base = run(patient, steps, looks=looks(patient, steps))
    simple = reference(patient, steps * len(patient.train[0][0]) * patient.accumulate)
    expected = simple.acc if simple is not None else 0.0
    exam = Examination(patient, steps, base, reached(base, patient), expected, found)
    measured["trial"] = _course(base) | {"reached": exam.reached, "expected": expected}
    tell("remedies")
    exam.findings = _judged(exam, measured)
    return _report(exam.findings, measured, began)


def _drawn(seen: dict[str, Any]) -> dict[str, Any]:
    """The signals with the names that the figures share with the doctor beside a loop."""
    layers = [row | {"grad_std": row["gradient"], "similarity": row["cosine"]} for row in seen["layers"]]
    weights = [
        row | {"path": row["name"], "grad_norm": row["gradient"], "weight_norm": row["norm"]} for row in seen["weights"]
    ]
    return seen | {"layers": layers, "weights": weights}


def looks(patient: Patient, steps: int) -> int:
    """How often a trial is looked at: every epoch, where it is the whole run and early stopping looks as often."""
    whole = patient.stopping is not None and steps == patient.total_steps
    return min(patient.epochs, 60, steps) if whole else min(8, steps)


def _strange_labels(patient: Patient) -> bool:
    """Whether the loss cannot be computed at all."""
    y = torch.cat([y for _, y in patient.train])
    return bool((y < 0).any() or (y >= patient.num_classes).any())


def reached(trial: Trial, patient: Patient) -> float:
    """Accuracy that a trial ends with, over validation and training images alike; 0 where it diverged.

    Early stopping goes back to the best epoch: its best look counts, where the trial is not looked at every epoch.
    """
    if trial.diverged:
        return 0.0
    val = trial.best.acc if patient.stopping else trial.val.acc
    return 0.5 * (val + trial.train.acc) if patient.val else trial.train.acc


def _report(found: list[Finding], measured: Mapping[str, Any], began: float) -> Report:
    prescribed = [f if f.overrides or f.mend else _from_table(f) for f in found]
    return Report(ordered(prescribed), measured, time.perf_counter() - began)


def _from_table(finding: Finding) -> Finding:
    return replace(finding, overrides=finding.about.overrides, mend=finding.about.mend)


def _judged(exam: Examination, measured: dict[str, Any]) -> list[Finding]:
    """The findings that stand: what is certain, and what a remedy has borne out."""
    certain = [f for f in exam.findings if f.certain and f.disease not in _BEARABLE]
    suspected = _suspected(exam)
    if exam.reached < _GOOD:
        _treat(exam, suspected)
        if exam.base.train.acc < _LEARNED:
            _treat_rate(exam, measured)
        _treat_length(exam)
    measured["remedies"] = [list(row) for row in exam.tried]
    borne_out = _ranked(exam) + _neglected(exam) + _impatient(exam) + _overfitting(exam)
    if not certain and _suffers(exam):
        borne_out += _unexplained(exam, suspected)
    if borne_out:  # what is beyond doubt may well be behind it, even where its remedy alone gains little
        named = {f.disease for f in borne_out}
        sure = [f for f in exam.findings if f.certain and f.disease in _BEARABLE and f.disease not in named]
        borne_out += [replace(f, gravity=0.9 * f.gravity) for f in sure]
    return certain + borne_out


def _suspected(exam: Examination) -> list[Suspect]:
    """All suspicions, those of the model and the data with their remedies, the gravest first."""
    seen = {f.disease: f.gravity for f in exam.findings}
    mine = [
        replace(s, finding=replace(s.finding, gravity=max(s.finding.gravity, seen.get(s.finding.disease, 0.0))))
        for s in suspects(exam.patient, exam.base)
    ]
    named = {s.finding.disease for s in mine}
    for f in exam.findings:
        if (not f.certain or f.disease in _BEARABLE) and f.disease not in named:
            mine.append(Suspect(f, tuple(_ways(exam.patient, f))))
    return sorted(mine, key=lambda s: -s.finding.gravity)


def _ways(patient: Patient, finding: Finding) -> list[tuple[tuple[str, ...], Remedy]]:
    if finding.disease == "unscaled_inputs":
        return [(("scaling=standardize",), remedies.standardized)]
    if finding.disease in _SIGNAL:
        return remedies.inits(patient)
    if finding.disease == "tiny_norm_batches":
        return [(("data.batch_size=64",), remedies.merged(64)), (("norm=group",), remedies.group_norm)]
    if finding.disease == "stale_statistics":
        return [(("norm=group",), remedies.lively_statistics), (("norm=group",), remedies.group_norm)]
    if finding.disease == "precision_underflow":
        return [(("trainer.precision=32-true",), remedies.full_precision)]
    return []


def _treat(exam: Examination, suspected: list[Suspect]) -> None:
    """A trial for each suspicion, the gravest first; the first of its ways that mends it is enough."""
    for suspect in suspected[:6]:
        best, lines = -math.inf, ()
        for way, remedy in suspect.ways:
            treated = applied(remedy, exam.patient)
            if treated is None:
                continue
            gain = exam.gain(treated, suspect.finding.disease, " ".join(way))
            if gain > best:
                best, lines = gain, way
            if gain >= max(
                exam.least(suspect.finding.disease, suspect.finding.gravity), 0.5 * (exam.expected - exam.reached)
            ):
                break
        if best >= exam.least(suspect.finding.disease, suspect.finding.gravity):
            others = [way for way, _ in suspect.ways if way != lines]
            finding = replace(suspect.finding.prescribed(lines, *others), gain=100 * best)
            exam.treated.append((finding, best))


def _treat_rate(exam: Examination, measured: dict[str, Any]) -> None:
    """Other learning rates, and a decay of it."""
    patient, base = exam.patient, exam.base
    curve = measured["range"] = rate_range(patient)
    stretch = max(1.0, patient.total_steps / exam.steps)
    for disease, factors in (("lr_too_high", _lower(exam)), ("lr_too_low", _higher(curve))):
        gain, factor = max((exam.gain(rate(f)(patient), disease, f"rate x {f:g}"), f) for f in factors)
        if disease == "lr_too_low" and factor <= 3 * stretch and stretch > 1.5:
            continue  # the run itself is as much longer than the trial
        if gain >= exam.least(disease):
            exam.treated.append((_rate_finding(patient, base, curve, disease, factor, gain), gain))
    if base.rates and min(base.rates[-3:]) > 0.5 * max(base.rates) and not base.diverged:
        gain = exam.gain(remedies.decay(patient), "no_decay", "scheduler=cosine")
        if gain >= _GAIN:
            evidence = (
                f"the rate is {base.rates[-1]:.3g} to the end; falling to 0 it reaches {100 * gain:.1f} points more"
            )
            # Where the same rate does as well once it falls, it is not too high.
            lower = max((g for f, g in exam.treated if f.disease == "lr_too_high"), default=0.0)
            gravity = 0.6 if exam.reached > 0.8 * exam.expected and gain > 0.8 * lower else 0.45
            finding = Finding("no_decay", evidence, gravity, certain=False, gain=100 * gain)
            exam.treated.append((finding.prescribed(("scheduler=cosine",), ("scheduler=linear",)), gain))


def _lower(exam: Examination) -> list[float]:
    return [0.1, 0.01, 0.001] if exam.base.diverged or exam.reached < 0.5 * exam.expected else [0.1]


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
    own = (patient.config.get("optimizer") or {}).get("lr") or max(group_values(patient, "lr"), default=lr)
    end = "diverged" if base.diverged else f"ended at loss {base.losses[-1]:.3g} (from {base.losses[0]:.3g})"
    evidence = (
        f"at rate {own:.3g} the trial {end}; {factor:g} times it reaches {100 * gain:.1f} points more{_takeoff(curve)}"
    )
    gravity = 0.6 if base.diverged else 0.5
    finding = Finding(disease, evidence, gravity, certain=False, gain=100 * gain)
    return finding.prescribed((f"optimizer.lr={own * factor:.3g}",))


def _takeoff(curve: Mapping[str, Any]) -> str:
    losses = curve.get("losses") or []
    if len(losses) < 10:
        return ""
    least = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    return f"; in the range test the loss is lowest near rate {curve['rates'][least]:.2g}"


def _impatient(exam: Examination) -> list[Finding]:
    """Early stopping that would end the trial long before its best."""
    step, best = stopped(exam.patient, exam.base)
    gain = exam.base.best.acc - best.acc
    if exam.patient.total_steps > exam.steps or gain < _GAIN or step >= exam.steps:
        return []
    evidence = (
        f"early stopping (patience {exam.patient.stopping}, min_delta {exam.patient.min_delta:g}) ends the run at step "
        f"{step} of {exam.steps} with accuracy {best.acc:.2f}; left alone it reaches {exam.base.best.acc:.2f}"
    )
    finding = Finding("stopping_too_early", evidence, 0.9, gain=100 * gain)
    ways = ("stopping=early", "stopping.patience=10", "stopping.min_delta=0"), ("stopping=none",)
    return [finding.prescribed(*ways)]


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
    if gain >= (_GAIN if short else exam.least("stopping_too_early")):
        evidence = (
            f"the run is {exam.steps} steps long and ends at accuracy {exam.base.val.acc:.2f}; "
            f"{steps} steps reach {100 * gain:.1f} points more"
        )
        finding = Finding("stopping_too_early", evidence, 0.6 if short else 0.45, certain=False, gain=100 * gain)
        exam.treated.append((finding.prescribed((f"trainer.max_epochs={4 * patient.epochs}",)), gain))


def _ranked(exam: Examination) -> list[Finding]:
    """What remedies bore out: by its own evidence where they do as well, behind that by what they gain."""
    if not exam.treated:
        return []
    top = max(gain for _, gain in exam.treated)
    ranked = []
    for finding, gain in exam.treated:
        share = gain / top
        weight = 0.5 + 0.4 * finding.gravity if share >= _SHARE else 0.4 * share
        ranked.append(replace(finding, gravity=weight))
    return _causes_first(ranked)


def _causes_first(findings: list[Finding]) -> list[Finding]:
    """Images that have become one vector explain large scores; large scores do not explain that."""
    collapse = max((f.gravity for f in findings if f.disease == "signal_collapse"), default=0.0)
    if collapse < 0.6:
        return findings
    return [
        replace(f, gravity=min(f.gravity, collapse - 0.01)) if f.disease == "exploding_gradient" else f
        for f in findings
    ]


def _neglected(exam: Examination) -> list[Finding]:
    """A suspected imbalance, where the trained model misses the rare classes more than the others."""
    suspected = [f for f in exam.findings if f.disease == "class_imbalance" and not f.certain]
    if not suspected or exam.base.model is None or not exam.patient.val:
        return []
    seen = torch.bincount(torch.cat([y for _, y in exam.patient.train]), minlength=exam.patient.num_classes)
    recall, there = recalls(exam.patient, exam.base.model)
    rare = (seen * 4 < seen.max()) & (there > 0)
    common = ~rare & (there > 0)
    if not bool(rare.any()) or not bool(common.any()):
        return []
    low, high = float(recall[rare].mean()), float(recall[common].mean())
    if high - low < 0.15:
        return []
    evidence = (
        f"{suspected[0].evidence}; the trial knows {low:.0%} of the images of rare classes and {high:.0%} of others"
    )
    return [replace(suspected[0], evidence=evidence, gravity=0.9, certain=True)]


def _suffers(exam: Examination) -> bool:
    """Whether the training stays far behind a simple classifier, with any remedy."""
    left = exam.expected - exam.reached - max((gain for _, gain in exam.treated), default=0.0)
    return left > 0.1


def _unexplained(exam: Examination, suspected: list[Suspect]) -> list[Finding]:
    """Capacity, where not even a batch is memorised; otherwise what is suspected, though no trial proved it."""
    share = memorised(exam.patient)
    if share < 0.9:
        evidence = f"taught one batch of 64 images alone, the model learns {share:.0%} of it"
        # A narrow place is capacity; otherwise what happens to the signal says why.
        narrow = any(s.finding.disease == "too_little_capacity" for s in suspected)
        signal = [s.finding for s in suspected if s.finding.disease in _SIGNAL and s.finding.gravity >= 0.5]
        weight = 0.88 if narrow or not signal else 0.7
        found = [Finding("too_little_capacity", evidence, weight)]
        found += [replace(f, gravity=0.6 + 0.25 * f.gravity) for f in signal[:3]]
        return found + [replace(s.finding, gravity=0.4 * s.finding.gravity) for s in suspected[:3]]
    if exam.treated:
        return []
    if suspected:
        return [replace(s.finding, gravity=0.4 * s.finding.gravity) for s in suspected[:3]]
    losses = exam.base.losses
    still = len(losses) > 5 and losses[-1] > 0.9 * losses[0]
    evidence = (
        f"the trial reaches {exam.reached:.2f} where a simple classifier reaches {exam.expected:.2f}, though the model "
        f"can memorise a batch; its loss went from {losses[0]:.3g} to {losses[-1]:.3g}"
    )
    return [Finding("lr_too_low" if still else "lr_too_high", evidence, 0.3)]


def _overfitting(exam: Examination) -> list[Finding]:
    """Training goes on to fall while validation gets worse."""
    base, patient = exam.base, exam.patient
    if patient.stopping or base.diverged or len(base.curve) < 4 or base.train.acc < 0.9:
        return []
    best = min(s.loss for _, s in base.curve)
    rise, gap = base.val.loss / max(best, 1e-6), base.train.acc - base.val.acc
    behind = base.train.acc > _LEARNED and base.val.acc < exam.expected - 0.03
    if (rise < 1.25 and not behind) or gap < 0.05:
        return []
    parameters = sum(p.numel() for p in patient.model.parameters())
    images = patient.images or 1
    evidence = (
        f"accuracy {base.train.acc:.2f} on training images and {base.val.acc:.2f} on validation, whose loss rose to "
        f"{rise:.2f} times its lowest; {parameters:,} parameters for {images:,} images"
    )
    large = parameters / images > 2000
    both = [("too_much_capacity", 0.65 if large else 0.35), ("overfitting", 0.6)]
    return [Finding(name, evidence, gravity) for name, gravity in both]


def _course(trial: Trial) -> dict[str, Any]:
    return {
        "losses": trial.losses,
        "accs": trial.accs,
        "norms": trial.norms,
        "updates": [list(u) for u in trial.updates],
        "curve": [[step, s.loss, s.acc] for step, s in trial.curve],
        "steps": trial_steps(trial),
    }

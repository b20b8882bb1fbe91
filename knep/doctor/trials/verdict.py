"""The verdict: which findings stand, and in what order."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from knep.doctor.findings import Finding, finding
from knep.doctor.trials.examination import BEARABLE, GAIN, LEARNED, SIGNAL, Examination, unfit
from knep.doctor.trials.lr_range import memorised
from knep.doctor.trials.run import stopped
from knep.doctor.trials.scoring import recalls
from knep.doctor.trials.suspects import Suspect

_SHARE = 0.6  # of the best remedy's gain that makes another one as good an explanation


def verdict(exam: Examination, suspected: list[Suspect]) -> list[Finding]:
    """What is certain, and what a remedy has borne out."""
    certain = [f for f in exam.findings if f.certain and f.disease not in BEARABLE]
    borne_out = _ranked(exam) + _neglected(exam) + _impatient(exam) + _overfitting(exam)
    if not certain and _suffers(exam):
        borne_out += _unexplained(exam, suspected)
    if borne_out:  # what is beyond doubt may well be behind it, even where its remedy alone gains little
        named = {f.disease for f in borne_out}
        sure = [f for f in exam.findings if f.certain and f.disease in BEARABLE and f.disease not in named]
        borne_out += [replace(f, gravity=0.9 * f.gravity) for f in sure]
    return certain + borne_out


def _ranked(exam: Examination) -> list[Finding]:
    """What remedies bore out: by its own evidence where they do as well, behind that by what they gain."""
    if not exam.treated:
        return []
    top = max(gain for _, gain in exam.treated)
    ranked = []
    for found, gain in exam.treated:
        share = gain / top
        weight = 0.5 + 0.4 * found.gravity if share >= _SHARE else 0.4 * share
        ranked.append(replace(found, gravity=weight))
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
    labels = torch.cat([y for _, y in exam.patient.train])
    seen = torch.bincount(labels[labels >= 0], minlength=exam.patient.num_classes)  # -100 is passed over by the loss
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


def _impatient(exam: Examination) -> list[Finding]:
    """Early stopping that would end the trial long before its best."""
    step, best = stopped(exam.patient, exam.base)
    gain = exam.base.best.acc - best.acc
    if exam.patient.total_steps > exam.steps or gain < GAIN or step >= exam.steps:
        return []
    evidence = (
        f"early stopping (patience {exam.patient.stopping}, min_delta {exam.patient.min_delta:g}) ends the run at step "
        f"{step} of {exam.steps} with accuracy {best.acc:.2f}; left alone it reaches {exam.base.best.acc:.2f}"
    )
    ways = ("stopping=early", "stopping.patience=10", "stopping.min_delta=0"), ("stopping=none",)
    return [finding("stopping_too_early", evidence, 0.9, gain=100 * gain, overrides=ways)]


def _suffers(exam: Examination) -> bool:
    """Whether the training stays far behind a simple classifier, with any remedy."""
    if exam.unfinished:
        return False
    left = exam.expected - exam.arrived - max((gain for _, gain in exam.treated), default=0.0)
    return left > 0.1


def _unexplained(exam: Examination, suspected: list[Suspect]) -> list[Finding]:
    """Capacity, where not even a batch is memorised; otherwise what is suspected, though no trial proved it."""
    share = memorised(exam.patient)
    if share < 0.9:
        evidence = f"taught one batch of 64 images alone, the model learns {share:.0%} of it"
        # A narrow place is capacity; otherwise what happens to the signal says why.
        narrow = any(s.finding.disease == "too_little_capacity" for s in suspected)
        signal = [s.finding for s in suspected if s.finding.disease in SIGNAL and s.finding.gravity >= 0.5]
        weight = 0.88 if narrow or not signal else 0.7
        found = [finding("too_little_capacity", evidence, weight)]
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
    return [finding("lr_too_low" if still else "lr_too_high", evidence, 0.3)]


def _overfitting(exam: Examination) -> list[Finding]:
    """Training goes on to fall while validation gets worse."""
    base, patient = exam.base, exam.patient
    if unfit(exam.findings):
        return []
    if patient.stopping or base.diverged or len(base.curve) < 4 or base.train.acc < 0.9:
        return []
    best = min(s.loss for _, s in base.curve)
    rise, gap = base.val.loss / max(best, 1e-6), base.train.acc - base.val.acc
    behind = base.train.acc > LEARNED and base.val.acc < exam.expected - 0.1
    seen = max(1, sum(len(y) for _, y in patient.val))
    chance = math.sqrt(base.val.acc * (1 - base.val.acc) / seen)  # of a validation split of this size
    if (rise < 1.25 and not behind) or gap < 0.05 + chance:
        return []
    parameters = sum(p.numel() for p in patient.model.parameters())
    images = patient.images or 1
    evidence = (
        f"accuracy {base.train.acc:.2f} on training images and {base.val.acc:.2f} on validation, where a simple "
        f"classifier reaches {exam.expected:.2f}; validation loss rose to {rise:.2f} times its lowest; {parameters:,} "
        f"parameters for {images:,} images"
    )
    large = parameters / images > 2000
    both = [("too_much_capacity", 0.65 if large else 0.35), ("overfitting", 0.6)]
    return [finding(name, evidence, gravity) for name, gravity in both]

"""What an examination knows so far, and how a trial is judged."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean

from knep.doctor.findings import Finding
from knep.doctor.patient import Patient
from knep.doctor.trial import Trial, run
from knep.errors import InputError

SIGNAL = frozenset({"vanishing_gradient", "exploding_gradient", "dying_relu", "saturation", "signal_collapse"})
# What some networks bear: reported only where the training suffers.
BEARABLE = SIGNAL | {
    "unscaled_inputs", "tiny_norm_batches", "stale_statistics", "precision_underflow", "too_little_capacity",
}  # fmt: skip
# With these, accuracy on validation tells nothing.
UNFIT = frozenset({"labels_off_by_one", "unrelated_labels", "validation_scaled_differently"})
LEARNED = 0.97  # accuracy on training images from which on no other rate or schedule is needed
GAIN = 0.025  # of accuracy that a remedy must bring
_LITTLE = 0.015  # the same, where the evidence alone is strong
_SOONER = 0.1  # the same, of a run that goes on learning after its trial: whatever is quicker gains there
_LONGER = 2.0  # times the trial's steps, from which on a run is longer
_FALLING = 0.95  # mean loss of a quarter of the trial over that of the quarter before, of one that learns
_GAINS = Path(__file__).with_name("gains.json")


@lru_cache
def healthy_gains() -> dict[str, float]:
    """Disease -> the most that its remedy gained, as accuracy, in a healthy run of the clinic's half A.

    Written by `scripts/healthy_gains.py`.
    """
    return json.loads(_GAINS.read_text(encoding="utf-8"))["largest"]


@dataclass
class Examination:
    """What is known so far.

    treated: findings that a remedy bore out, with its gain; tried: every remedy's; left: trials that may still be made.
    """

    patient: Patient
    steps: int
    base: Trial
    reached: float
    expected: float
    findings: list[Finding] = field(default_factory=list)
    treated: list[tuple[Finding, float]] = field(default_factory=list)
    tried: list[tuple[str, str, float]] = field(default_factory=list)
    left: int = 100

    def least(self, disease: str, gravity: float = 0.0) -> float:
        """The gain that counts: more than the same remedy brings to healthy runs, and a share of what is missing, since
        near chance accuracy is mostly noise. gravity: of the evidence; where it is strong, less will do.
        """
        usual = 1.25 * healthy_gains().get(disease, 0.0)
        missing = self.expected - self.reached
        if self.unfinished:
            return max(_SOONER, usual, 0.5 * missing)
        return max(_LITTLE if gravity >= 0.75 else GAIN, usual, 0.15 * missing)

    @cached_property
    def unfinished(self) -> bool:
        """Whether the run has most of its steps before it when the trial ends, and still learns there."""
        quarter = len(self.base.losses) // 4
        if self.base.diverged or not quarter or self.patient.total_steps < _LONGER * self.steps:
            return False
        late, before = (fmean(self.base.losses[-k * quarter :][:quarter]) for k in (1, 2))
        return late < _FALLING * before

    def gain(self, patient: Patient, disease: str, what: str) -> float:
        """What a trial of the treated patient reaches more than the first one; it is noted as tried."""
        self.left -= 1
        try:
            gain = reached(run(patient, self.steps), patient) - self.reached
        except (InputError, RuntimeError):  # the remedy does not fit this model
            gain = -self.reached
        self.tried.append((disease, what, round(gain, 4)))
        return gain


def unfit(findings: list[Finding]) -> bool:
    """Whether it is certain that validation cannot judge a training."""
    return any(f.certain and f.disease in UNFIT for f in findings)


def looks(patient: Patient, steps: int) -> int:
    """How often a trial is looked at: every epoch, where it is the whole run and early stopping looks as often."""
    whole = patient.stopping is not None and steps == patient.total_steps
    return min(patient.epochs, 60, steps) if whole else min(8, steps)


def reached(trial: Trial, patient: Patient) -> float:
    """Accuracy that a trial ends with, over validation and training images alike; 0 where it diverged.

    Early stopping goes back to the best epoch: its best look counts, where the trial is not looked at every epoch.
    """
    if trial.diverged:
        return 0.0
    val = trial.best.acc if patient.stopping else trial.val.acc
    return 0.5 * (val + trial.train.acc) if patient.val else trial.train.acc

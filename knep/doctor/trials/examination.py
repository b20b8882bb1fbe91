"""What an examination knows so far, and how a trial is judged."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean

from knep.doctor.findings import Finding
from knep.doctor.subject.setup import Patient
from knep.doctor.trials.budget import FEWEST, affordable_steps
from knep.doctor.trials.run import Trial, run
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
_LATER = 0.05  # the same, at the end of a longer trial
_AHEAD = 4  # times the trial's steps of the longer one
_BEHIND = 0.1  # of accuracy that is missing, from which on a longer trial says whether it comes later
_LOST = 0.25  # of accuracy that is still missing there, from which on the run is not excused by going on
_LONGER = 2.0  # times the trial's steps, from which on a run is longer
_FALLING = 0.95  # mean loss of a quarter of the trial over that of the quarter before, of one that learns
_GAINS = Path(__file__).with_name("gains.json")


@lru_cache
def healthy_gains() -> dict[str, float]:
    """Disease -> the most that its remedy gained, as accuracy, in a healthy run of the clinic's half A.

    Written by `scripts/clinic/measure_gains.py`.
    """
    return json.loads(_GAINS.read_text(encoding="utf-8"))["largest"]


@dataclass
class Examination:
    """What is known so far.

    reached, expected: accuracy of the trial, and of a simple classifier; treated: findings that a remedy bore out, with
    its gain; tried: every remedy's; left: trials that may still be made; later: the accuracy of a longer trial of
    `ahead` steps, where one was needed (`look_ahead`).
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
    later: float | None = None
    ahead: int = 0

    def look_ahead(self) -> None:
        """Of a run that still learns when its trial ends, far from where it should be: whether a longer trial arrives.

        It costs as much as some remedies, which are not tried then; a few always are.
        """
        ahead = min(self.patient.total_steps, _AHEAD * self.steps, affordable_steps(self.patient))
        if self._learns and self.expected - self.reached > _BEHIND and ahead >= _LONGER * self.steps:
            self.ahead = ahead
            self.later = reached(run(self.patient, self.ahead), self.patient)
            self.left = max(min(self.left, FEWEST), self.left - round(self.ahead / self.steps))

    def least(self, disease: str, gravity: float = 0.0) -> float:
        """The gain that counts: more than the same remedy brings to healthy runs, and a share of what is missing, since
        near chance accuracy is mostly noise. gravity: of the evidence; where it is strong, less will do.
        """
        usual = 1.25 * healthy_gains().get(disease, 0.0)
        missing = self.expected - self.reached
        if self.unfinished and self.later is None:
            return max(_SOONER, usual, 0.5 * missing)
        if self.unfinished:  # the longer trial has the last word
            return max(_LATER if gravity >= 0.75 else _SOONER, usual)
        return max(_LITTLE if gravity >= 0.75 else GAIN, usual, 0.15 * missing)

    def lasting(self, patient: Patient, disease: str, what: str, gain: float, gravity: float = 0.0) -> float:
        """What of a remedy's gain counts (`least`), and is there at the end of the longer trial, where there was one; 0
        where it is little.

        Whatever makes a network learn sooner gains in the trial, and may gain nothing in the run.
        """
        if gain < self.least(disease, gravity):
            return 0.0
        if not self.unfinished or self.later is None:
            return gain
        what = f"{what}, {self.ahead} steps"
        again = self._same(disease, what)
        if again is None:
            self.left -= round(self.ahead / self.steps)
            gain = reached(run(patient, self.ahead), patient) - self.later
            self.tried.append((disease, what, round(gain, 4)))
        else:
            gain = again
        usual = 1.25 * healthy_gains().get(disease, 0.0)
        return gain if gain >= max(_LATER, usual, 0.25 * (self.expected - self.later)) else 0.0

    @property
    def arrived(self) -> float:
        """The accuracy that was reached in the end, of the trial or of the longer one."""
        return self.reached if self.later is None else max(self.reached, self.later)

    @cached_property
    def unfinished(self) -> bool:
        """Whether the trial says too little of the run: it still learns there, and does not fail later either."""
        return self._learns and (self.later is None or self.expected - self.later <= _LOST)

    @cached_property
    def _learns(self) -> bool:
        """Whether the run has most of its steps before it when the trial ends, and its loss still falls there."""
        quarter = len(self.base.losses) // 4
        if self.base.diverged or not quarter or self.patient.total_steps < _LONGER * self.steps:
            return False
        late, before = (fmean(self.base.losses[-k * quarter :][:quarter]) for k in (1, 2))
        return late < _FALLING * before

    def gain(self, patient: Patient, disease: str, what: str) -> float:
        """What a trial of the treated patient reaches more than the first one; it is noted as tried."""
        again = self._same(disease, what)
        if again is not None:
            return again
        self.left -= 1
        try:
            gain = reached(run(patient, self.steps), patient) - self.reached
        except (InputError, RuntimeError):  # the remedy does not fit this model
            gain = -self.reached
        self.tried.append((disease, what, round(gain, 4)))
        return gain

    def _same(self, disease: str, what: str) -> float | None:
        """What the same remedy gained against another trouble of the signal, all of which take the same ones."""
        before = (g for d, w, g in self.tried if w == what and {d, disease} <= SIGNAL)
        gain = next(before, None)
        if gain is not None:
            self.tried.append((disease, what, gain))
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

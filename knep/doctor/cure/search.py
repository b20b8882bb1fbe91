"""The cure: what a report prescribes and what is usual beside it, in short paired trials; what helps is kept.

    report -- ways -- one trial each -- the best again with another seed -- keep -- examine again, or more ways
                                                                 at the end: a seed that chose nothing has the last word

Only the validation split is looked at. Two trials that are compared have the same seed, for weights and batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from knep.config.compose import compose_config
from knep.doctor.cure import candidates as known
from knep.doctor.cure.candidates import OVERFITS, Way, apart, merged, tidied
from knep.doctor.cure.result import FAR, Cured
from knep.doctor.diagnose import diagnose
from knep.doctor.findings import Report
from knep.doctor.subject.setup import Patient, from_config
from knep.doctor.trials.budget import steps_of, thinned
from knep.doctor.trials.examination import UNFIT, looks
from knep.doctor.trials.run import run, stopped
from knep.doctor.trials.scoring import Score
from knep.errors import InputError

SECONDS = 90.0  # of computing, after which nothing new is tried
_GAIN = 0.01  # validation accuracy that a way must bring
_LESS = 0.75  # of the validation loss, which counts as much where accuracy is no lower
_ROUNDS = 3
_LARGE = 0.05  # the same, over three seeds, which stands against one in which it is not there
_FINAL, _REACH = 3, 0.03  # ways of a round that are tried with a second seed; how far behind the best in one
_PERFECT = 0.99
# Findings after which no number of this validation split can be trusted, or none is to be had.
_BLIND = UNFIT | {
    "leaked_validation", "labels_out_of_range", "constant_labels", "constant_inputs", "non_finite_inputs",
}  # fmt: skip

Make = Callable[[Sequence[str]], Patient]


def cure(
    overrides: Sequence[str],
    *,
    make: Make | None = None,
    report: Report | None = None,
    told: Callable[[str], None] | None = None,
    seconds: float = SECONDS,
) -> Cured:
    """Tries ways against what the report on these override lines finds, and keeps those that help.

    make: from lines, the patient (default: as `knep doctor` makes it); report: of the first examination, if there is
    one already; seconds: of computing, after which nothing new is tried: what the clock shows where nothing else runs,
    so that a busy machine tries as much. Raises InputError for lines that cannot work.
    """
    make = make or patient_of
    report = report or diagnose(make(overrides))
    began = _computed()
    blind = next((f for f in report.findings if f.disease in _BLIND and f.certain), None)
    if blind is not None or not report.sick:
        note = f"{blind.about.title}: mend that first, then examine it again" if blind else ""
        return Cured(tuple(overrides), (), 0.0, 0.0, report, note=note)
    ward = _Ward(make, told or (lambda _: None), began + seconds)
    lines, kept, late = _treated(ward, tidied(overrides), report)
    lines, kept = _borne_out(ward, tidied(overrides), lines, kept)
    before, after = ward.mean(tidied(overrides)), ward.mean(lines)
    return Cured(
        overrides=lines if kept else tuple(overrides),
        kept=tuple(kept),
        before=before.acc,
        after=after.acc,
        report=report,
        loss=(before.loss, after.loss),
        tried=tuple((way, acc) for way, acc in ward.tried.items() if way not in dict(kept)),
        trials=ward.trials,
        seconds=_computed() - began,
        note=f"{seconds:.0f} s were over before all was tried: --budget gives more" if late else "",
    )


@dataclass
class _Ward:
    """Trials of lines, each made once.

    seed: of the run; until: of `_computed`; tried: way -> its best accuracy in one trial, None where it does not fit.
    """

    make: Make
    told: Callable[[str], None]
    until: float
    seed: int = 0
    trials: int = 0
    tried: dict[Way, float | None] = field(default_factory=dict)
    seen: dict[tuple[Way, int], Score] = field(default_factory=dict)
    made: tuple[Way, Patient] | None = None

    @property
    def late(self) -> bool:
        return _computed() > self.until

    def patient(self, lines: Way) -> Patient:
        if self.made is None or self.made[0] != lines:
            self.made = (lines, self.make(lines))
        return self.made[1]

    def score(self, lines: Way, seed: int) -> Score:
        """What a trial reaches with other first weights and another order of batches; seed: 0 for the run's own."""
        if (lines, seed) not in self.seen:
            other = merged(lines, (f"seed={self.seed + seed}",)) if seed else lines
            self.seen[lines, seed] = measured(self.patient(other))
            self.trials += 1
        return self.seen[lines, seed]

    def mean(self, lines: Way) -> Score:
        """Over the seeds that these lines were tried with, the run's own at least."""
        self.score(lines, 0)
        scores = [score for (those, _), score in self.seen.items() if those == lines]
        return Score(fmean(s.loss for s in scores), fmean(s.acc for s in scores))

    def gain(self, lines: Way, better: Way, seeds: Sequence[int]) -> float:
        """Accuracy that better lines have more, in paired trials; a much lower loss counts where it is no lower."""
        pairs = [(self.score(lines, seed), self.score(better, seed)) for seed in seeds]
        gain = sum(b.acc - a.acc for a, b in pairs) / len(pairs)
        calmer = sum(b.loss for _, b in pairs) < _LESS * sum(a.loss for a, _ in pairs)
        return max(gain, _GAIN) if calmer and gain >= 0 else gain


def _computed() -> float:
    """Seconds that this process has computed, by the clock of an idle machine."""
    return time.process_time() / torch.get_num_threads()


def measured(patient: Patient) -> Score:
    """Validation score where the patient's trial ends, early stopping included; accuracy 0 where it diverged."""
    patient = thinned(patient)[0]
    steps = steps_of(patient)
    trial = run(patient, steps, looks=looks(patient, steps))
    score = stopped(patient, trial)[1]
    return Score(score.loss, 0.0) if trial.diverged else score


def patient_of(lines: Sequence[str]) -> Patient:
    """The patient that override lines describe."""
    return from_config(compose_config(lines).run, lines)


def _treated(ward: _Ward, lines: Way, report: Report) -> tuple[Way, list[tuple[Way, float]], bool]:
    """The lines with every way that helped, these ways with the accuracy after each, and whether time ran out."""
    kept: list[tuple[Way, float]] = []
    patient = ward.patient(lines)
    ward.seed = patient.seed
    pools = [known.prescribed(report), known.usual(report, patient)]
    top, simple = report.findings[0], report.measured.get("trial", {}).get("expected", 0.0)
    if top.overrides or not top.mend:  # else the cause is known, and not for lines to mend
        pools.append(known.common(patient))
    while pools and len(kept) < _ROUNDS and not ward.late:
        gains = _screened(ward, lines, pools.pop(0))
        way = _best(ward, lines, gains)
        if way is None:
            continue
        lines = merged(lines, way)
        kept.append((way, ward.mean(lines).acc))
        if kept[-1][1] > _PERFECT:
            return lines, kept, False
        ranked = sorted(gains.items(), key=lambda row: -row[1])
        promising = [w for w, gain in ranked if gain >= _GAIN / 2 and apart(w, way)]
        pool = dict.fromkeys([*_next(ward, lines, report), *known.finer(way), *promising])
        pools = [[w for w in pool if merged(lines, w) != lines]]
        if kept[-1][1] < simple - FAR:
            pools.append([w for w in known.common(ward.patient(lines)) if merged(lines, w) != lines])
    return lines, kept, ward.late


def _next(ward: _Ward, lines: Way, report: Report) -> list[Way]:
    """What another examination prescribes, where it can see what is left."""
    if report.findings[0].disease in OVERFITS:  # an end in time hides it
        return []
    ward.told("examining again")
    return known.prescribed(diagnose(ward.patient(lines)))


def _screened(ward: _Ward, lines: Way, pool: Sequence[Way]) -> dict[Way, float]:
    """What each way that fits gains in one trial, as far as time allows."""
    gains: dict[Way, float] = {}
    for way in pool:
        if ward.late:
            break
        ward.told(" ".join(way))
        better = merged(lines, way)
        try:
            gains[way] = ward.gain(lines, better, (0,))
        except (InputError, RuntimeError):  # this way does not fit this model
            ward.tried.setdefault(way, None)
            continue
        ward.tried[way] = max(ward.score(better, 0).acc, ward.tried.get(way) or 0.0)
    return gains


def _best(ward: _Ward, lines: Way, gains: dict[Way, float]) -> Way | None:
    """The way that gains most over two seeds, of the best in one; the first of those that do as well."""
    least = max(_GAIN / 2, max(gains.values(), default=0.0) - _REACH)
    final = sorted((way for way, gain in gains.items() if gain >= least), key=lambda way: -gains[way])[:_FINAL]
    chosen, top = None, _GAIN
    for way in (way for way in gains if way in final):
        gain = ward.gain(lines, merged(lines, way), (0, 1))
        if gain >= top:
            chosen, top = way, gain + _GAIN / 2
    return chosen


def _borne_out(
    ward: _Ward, start: Way, lines: Way, kept: list[tuple[Way, float]]
) -> tuple[Way, list[tuple[Way, float]]]:
    """The ways without the last ones, as long as a seed that chose nothing shows no gain: the best of many has luck.

    A sick run has luck too, now and then: a first way whose gain over all seeds is large stands, where with this one it
    does about as well as the sick run.
    """
    while kept and ward.gain(start, lines, (2,)) <= 0:
        as_well = len(kept) == 1 and ward.gain(start, lines, (2,)) > -_REACH
        if as_well and ward.gain(start, lines, (0, 1, 2)) >= _LARGE:
            break
        kept = kept[:-1]
        lines = start
        for way, _ in kept:
            lines = merged(lines, way)
    return lines, kept

"""The examination: from cheap to dear, each part stopping where it is sure.

    data -- one pass at the start -- trial -- suspects, each with a second trial without it -- verdict

Certain findings are bugs and always reported. A suspicion is reported where the same training without it does better:
a cause is what a remedy mends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from knep.doctor.data.baseline_accuracy import reference
from knep.doctor.data.examine import Data
from knep.doctor.data.split_view import IGNORED
from knep.doctor.findings import Finding, Report, ordered
from knep.doctor.model.examine import model_findings
from knep.doctor.model.signal_pass import signals
from knep.doctor.subject.objective import check_loss
from knep.doctor.subject.setup import Patient
from knep.doctor.trials.budget import steps_of, thinned, trials_of
from knep.doctor.trials.examination import Examination, looks, reached, unfit
from knep.doctor.trials.run import Trial, run
from knep.doctor.trials.suspects import broken_images, without_outliers
from knep.doctor.trials.treatment import suspected_of, treat
from knep.doctor.trials.verdict import verdict

# What leaves nothing to examine behind it.
_FATAL = {"non_finite_inputs", "constant_inputs", "constant_labels", "labels_out_of_range"}


def diagnose(patient: Patient, *, told: Callable[[str], None] | None = None) -> Report:
    """Examines a patient and reports what keeps it from learning. told: called with what is being looked at.

    Raises InputError for a model or a loss that fails on its data.
    """
    began = time.perf_counter()
    tell = told or (lambda _: None)
    check_loss(patient)
    tell("data")
    # A few broken images would make the statistics of the whole split strange: they are a disease of their own.
    data = Data(without_outliers(patient) if broken_images(patient) else patient)
    found = data.findings()
    measured: dict[str, Any] = {"data": data.seen()}
    if any(f.certain and f.disease in _FATAL for f in found) or _strange_labels(patient):
        return _report(found, measured, began)
    tell("signals")
    seen = signals(patient)
    measured["signals"] = _drawn(seen.as_dict())
    found += model_findings(patient, seen)
    if not seen.reached:  # nothing can be trained
        return _report(found, measured, began)
    tell("trial")
    patient, thin = thinned(patient)
    steps = steps_of(patient)
    base = run(patient, steps, looks=looks(patient, steps))
    simple = reference(patient, steps * len(patient.train[0][0]) * patient.accumulate)
    expected = simple.acc if simple is not None else 0.0
    exam = Examination(patient, steps, base, reached(base, patient), expected, found, left=trials_of(patient, steps))
    if not unfit(found):
        exam.look_ahead()
    measured["trial"] = _course(base) | {
        "reached": exam.reached,
        "expected": expected,
        "later": exam.later,
        "ahead": exam.ahead,
    }
    suspected = suspected_of(exam)
    if not unfit(found):
        tell("remedies")
        treat(exam, suspected, measured)
    return _report(verdict(exam, suspected), measured, began, thin)


def _drawn(seen: dict[str, Any]) -> dict[str, Any]:
    """The signals with the names that the figures share with the doctor beside a loop."""
    layers = [row | {"grad_std": row["gradient"], "similarity": row["cosine"]} for row in seen["layers"]]
    weights = [
        row | {"path": row["name"], "grad_norm": row["gradient"], "weight_norm": row["norm"]} for row in seen["weights"]
    ]
    return seen | {"layers": layers, "weights": weights}


def _strange_labels(patient: Patient) -> bool:
    """Whether the loss cannot be computed at all."""
    y = torch.cat([y for _, y in patient.train])
    y = y[y != IGNORED]
    return bool((y < 0).any() or (y >= patient.num_classes).any())


def _report(found: list[Finding], measured: Mapping[str, Any], began: float, note: str = "") -> Report:
    # A suspicion that no trial bore out has none of its own yet.
    told = [f if f.overrides or f.mend else replace(f, overrides=f.about.overrides, mend=f.about.mend) for f in found]
    return Report(ordered(told), measured, time.perf_counter() - began, (note,) if note else ())


def _course(trial: Trial) -> dict[str, Any]:
    return {
        "losses": trial.losses,
        "accs": trial.accs,
        "norms": trial.norms,
        "updates": [list(u) for u in trial.updates],
        "curve": [[step, s.loss, s.acc] for step, s in trial.curve],
        "steps": len(trial.losses),
        "lag": trial.lag,
    }

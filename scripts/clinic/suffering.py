"""Whether a case is what it says: a sick one suffers measurably against its healthy twin, a healthy one learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from knep.doctor.subject.setup import Patient
from knep.doctor.trials import run as trial
from knep.doctor.trials import scoring
from scripts.clinic.cases.case import Case, Mutation, patient, remade, twin

_STEPS = 400
_POINTS = 0.02  # of accuracy
_LOSS = 1.2  # times the twin's
_SOUND = {"digits": 0.94, "fashion_mnist": 0.77, "synthetic": 0.9}  # accuracy that a healthy run reaches at least
_SURE = 1.64  # standard errors


def measure(case: Case) -> dict[str, Any]:
    """Validation accuracy and loss of patient and twin, in shares and nats, and whether the case is what it says."""
    well = _well(case.base, case.both)
    if not case.disease:
        return {"acc": well["acc"], "loss": well["loss"], "counts": well["acc"] >= _least(case.lines)}
    ill = patient(case)
    try:
        trained = _trained(ill)
    except (RuntimeError, IndexError) as error:  # what torch raises for labels out of range
        if not case.crashes:
            raise
        return {"twin_acc": well["acc"], "crashed": type(error).__name__, "counts": True}
    row = {"acc": trained[0].acc, "loss": trained[0].loss, "twin_acc": well["acc"], "twin_loss": well["loss"]}
    if case.mark == "leak":
        row |= _leak(ill, twin(case), trained[1])
    count = sum(len(y) for _, y in ill.val)
    return row | {"images": count, "counts": _suffers(row, count, case.mark)}


def _least(lines: Sequence[str]) -> float:
    return _SOUND[next(line[5:] for line in reversed(lines) if line.startswith("data="))]


def trained_acc(case: Case, overrides: Sequence[str]) -> dict[str, float]:
    """Validation accuracy of the case under other lines, beside its twin's."""
    score, _ = _trained(remade(case, overrides))
    return {"acc": score.acc, "twin_acc": _well(case.base, case.both)["acc"]}


@cache
def _well(base: tuple[str, ...], both: Mutation | None) -> dict[str, float]:
    score, _ = _trained(twin(Case("", "", "", base, both=both)))
    return {"acc": score.acc, "loss": score.loss}


def _trained(patient: Patient) -> tuple[scoring.Score, Any]:
    """The validation score with which the run would end, and the trained model."""
    steps = min(patient.total_steps, _STEPS)
    looks = max(1, min(patient.epochs, steps)) if patient.stopping else 1
    run = trial.run(patient, steps, looks=looks)
    return trial.stopped(patient, run)[1], run.model


def _leak(ill: Patient, well: Patient, model: Any) -> dict[str, float]:
    """Accuracy on the twin's validation images that the patient did not train on."""
    known = {_name(x) for xs, _ in ill.train for x in xs}
    fresh = [
        (xs[keep], ys[keep]) for xs, ys in well.val if (keep := torch.tensor([_name(x) not in known for x in xs])).any()
    ]
    return {"held_acc": scoring.score(ill, model, fresh).acc}


def _name(x: Tensor) -> bytes:
    return x.numpy().tobytes()


def _suffers(row: dict[str, float], count: int, mark: str) -> bool:
    """Two points and more than chance does in as many images, or the disease's own mark."""
    if mark == "loss" and row["loss"] > max(_LOSS * row["twin_loss"], row["twin_loss"] + 0.05):
        return True
    high, low = (row["acc"], row["held_acc"]) if mark == "leak" else (row["twin_acc"], row["acc"])
    error = math.sqrt((high * (1 - high) + low * (1 - low)) / count)
    return high - low >= max(_POINTS, _SURE * error)

"""What trials a patient can have, by what its network costs: a matter of the model and not of the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from knep.doctor.subject.batches import Batch
from knep.doctor.subject.setup import Patient
from knep.surgery.record import calls

_MACS = 6e10  # of a whole trial: a few seconds on one core
_OF_A_NUMBER = 30  # multiply-adds in the time that a number takes to be written: 10 in large layers, 60 in small ones
_TRIALS = 40  # of an examination, where a trial costs no more than that
FEWEST = 6
_SHORT, _LONG = 60, 600  # steps
_LEAST = 20  # the same, of networks whose trial would cost more than _DEAREST
_DEAREST = 6e11  # of a trial, as `cost` counts it: 10 to 20 seconds on one core
_IMAGES = 16  # in a batch, at the least: of fewer, the statistics of batch norm are noise
_LOOKS = 256  # images of validation


def cost(patient: Patient) -> tuple[float, float]:
    """Of a training step, as three times the forward's: multiply-adds of convolutions and linear layers, and these with
    what else takes time, the memory that every layer writes."""
    x = patient.inputs(patient.train[0][0][:2])
    macs = numbers = 0.0
    for call in calls(patient.model, x):
        if not isinstance(call.output, Tensor):
            continue
        weight = getattr(call.module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2:
            places = call.output.numel() / max(1, call.output.shape[1 if weight.ndim > 2 else -1])
            macs += places * weight.numel()
        numbers += call.output.numel()
    times = 3 / len(x) * len(patient.train[0][0])
    return times * macs, times * (macs + _OF_A_NUMBER * numbers)


def steps_of(patient: Patient) -> int:
    """How many steps a trial takes: the whole run, or what a few seconds of one core allow, 60 at the least; 20 where
    every step takes a second.

    It depends on the model and not on the clock, so that two examinations see the same.
    """
    macs, dear = cost(patient)
    allowed = min(int(_MACS / max(macs, 1.0)), _LONG)
    least = max(_LEAST, min(_SHORT, int(_DEAREST / max(dear, 1.0))))
    return max(1, min(patient.total_steps, max(least, allowed)))


def affordable_steps(patient: Patient) -> int:
    """How many steps a longer trial may take: what costs twice the dearest of the others."""
    return int(2 * _DEAREST / max(cost(patient)[1], 1.0))


def trials_of(patient: Patient, steps: int) -> int:
    """How many trials of `steps` an examination can afford; again a matter of the model and not of the clock."""
    dear = steps * cost(patient)[1] / _MACS
    return max(FEWEST, int(_TRIALS / max(dear, 1.0)))


def thinned(patient: Patient) -> tuple[Patient, str]:
    """The patient with smaller batches, whose shortest trial costs what an examination can afford, and a line on it.

    What is affordable comes back as it is, with "". A rate that suits the smaller batches suits the larger ones, too.
    """
    size = len(patient.train[0][0])
    dear = _SHORT * cost(patient)[1] / _DEAREST
    if dear <= 1 or size <= _IMAGES or patient.device.type == "cuda":
        return patient, ""
    count = max(_IMAGES, int(size / dear))
    less = replace(patient, train=[(x[:count], y[:count]) for x, y in patient.train], val=_first(patient.val))
    return less, f"the network is dear to train: trials take {count} of the {size} images of a batch"


def _first(batches: Sequence[Batch]) -> list[Batch]:
    kept: list[Batch] = []
    room = _LOOKS
    for x, y in batches:
        if room <= 0:
            break
        kept.append((x[:room], y[:room]))
        room -= len(y)
    return kept

"""How a trained copy of a patient's model does on images, with the statistics its batch norms keep, or with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from knep.doctor.subject.batches import Batch
from knep.doctor.subject.copies import copied
from knep.doctor.subject.setup import Patient

_BATCHES = 30  # with the usual momentum of 0.1 they leave 4 % of what was before
_IMAGES = 16  # in a batch; the statistics of fewer are noise, however many batches they come from


@dataclass
class Score:
    """Of a model on images: mean loss (cross-entropy of its scores, whatever the run minimises) and accuracy."""

    loss: float
    acc: float


def score(patient: Patient, model: nn.Module, batches: Sequence[Batch], batch_stats: bool = False) -> Score:
    """In eval mode, or with the statistics of each batch, without augmentation."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    if batch_stats:
        model = copied(model)
        for m in norms_of(model):
            m.train()
    loss = correct = seen = 0.0
    with torch.no_grad():
        for x, y in batches:
            scores = model(patient.inputs(x)).double()
            y = y.to(scores.device)
            inside = (y >= 0) & (y < scores.shape[1])
            loss += float(F.cross_entropy(scores[inside], y[inside], reduction="sum")) if bool(inside.any()) else 0.0
            correct += int((scores.argmax(1) == y).sum())
            seen += len(y)
    for m, mode in modes.items():
        m.training = mode
    return Score(loss / max(seen, 1), correct / max(seen, 1))


def recalls(patient: Patient, model: nn.Module) -> tuple[Tensor, Tensor]:
    """By class (K,): the share of its validation images that the model knows, and how many there are."""
    right, there = torch.zeros(2, patient.num_classes).unbind()
    with torch.no_grad():
        for x, y in patient.val:
            guess = model.eval()(patient.inputs(x)).argmax(1).cpu()
            known = (y.cpu() >= 0) & (y.cpu() < patient.num_classes)
            guess, y = guess[known], y.cpu()[known]
            there += torch.bincount(y, minlength=patient.num_classes)
            right += torch.bincount(y[guess == y], minlength=patient.num_classes)
    return right / there.clamp_min(1), there


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """All its batch norms."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def settled(patient: Patient, model: nn.Module) -> nn.Module:
    """A copy of a model in training mode whose batch norms saw some more batches while its weights stood still.

    Those that the model keeps in eval mode stay as they are; so do all, where batches are of few images.
    """
    still = copied(model)
    lively = [m for m in norms_of(still) if m.training]
    still.eval()
    for m in lively:
        m.train()
    with torch.no_grad():
        for i in range(_BATCHES):
            x, _ = patient.train[i % len(patient.train)]
            if len(x) >= _IMAGES:
                still(patient.inputs(x))
    return still.train()

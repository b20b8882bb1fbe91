"""Two short probes beside the trial: whether the model can memorise one batch, and what each learning rate does."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from knep.doctor.model.signal_pass import like, widened
from knep.doctor.subject.setup import Patient
from knep.doctor.trials.dropout import capped
from knep.doctor.trials.run import cast

_IMAGES = 64


def memorised(patient: Patient, steps: int = 150) -> float:
    """The share of one training batch that the model can be taught, at the better of two rates of Adam.

    No dropout, augmentation, penalty or schedule, float32; batch norm uses the batch. A sound network reaches 1.
    """
    best = 0.0
    for lr in (3e-3, 3e-4):
        best = max(best, _memorise(patient, lr, steps))
        if best > 0.97:
            break
    return best


def _memorise(patient: Patient, lr: float, steps: int) -> float:
    x, y = patient.stacked(most=_IMAGES)
    best = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(patient.seed)
        model = widened(capped(0.0)(patient).model).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            return 0.0
        optimizer = torch.optim.Adam(parameters, lr=lr)
        x, y = like(model, patient.inputs(x)), y.to(patient.device)
        for _ in range(steps):
            optimizer.zero_grad()
            scores = model(x)
            loss = F.cross_entropy(scores, y) if patient.loss is None else patient.criterion(scores, y)
            if not math.isfinite(float(loss.detach())):
                break
            loss.backward()
            optimizer.step()
            best = max(best, float((scores.argmax(1) == y).float().mean()))
            if best > 0.97:
                break
    return best


def rate_range(patient: Patient) -> dict[str, list[float]]:
    """Training loss while the learning rate grows, step by step, to a thousand times the patient's own.

    The range test of Smith 2017, sec. 3.3: where the loss falls fastest is a good rate, where it takes off is too high.
    Ends when the loss is not finite or four times that of the start; where it never takes off, it goes on to 1e7 times.
    """
    curve = _range(patient, 1e-3, 1e3, 60)
    if len(curve["losses"]) == 60:
        higher = _range(patient, 1.0, 1e7, 70)
        curve = {key: curve[key][:30] + higher[key] for key in curve}
    return curve


def _range(patient: Patient, low: float, high: float, steps: int) -> dict[str, list[float]]:
    curve: dict[str, list[float]] = {"factors": [], "rates": [], "losses": []}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(patient.seed)
        model = copy.deepcopy(patient.model).train()
        optimizer: Any = patient.make_optimizer(model)
        own = [float(g["lr"]) for g in optimizer.param_groups]
        if hasattr(optimizer, "train"):  # schedule-free ones train at other weights than they are read at
            optimizer.train()
        for step in range(steps):
            factor = low * (high / low) ** (step / (steps - 1))
            for group, lr in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = lr * factor
            loss = _step(patient, model, optimizer, step)
            curve["factors"].append(factor)
            curve["rates"].append(max(own) * factor)
            curve["losses"].append(loss)
            if not math.isfinite(loss) or loss > 4 * curve["losses"][0] + 1:
                break
    return curve


def _step(patient: Patient, model: nn.Module, optimizer: Any, step: int) -> float:
    x, y = patient.train[step % len(patient.train)]
    x, y = x.to(patient.device), y.to(patient.device)
    losses: list[float] = []

    def closure() -> torch.Tensor:
        for p in model.parameters():
            p.grad = None
        with cast(patient):
            loss = patient.criterion(model(patient.scaling(x)), y)
        loss.backward()
        patient.clip([p for p in model.parameters() if p.grad is not None])
        losses.append(float(loss.detach()))
        return loss

    optimizer.step(closure)
    return losses[0]

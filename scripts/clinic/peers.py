"""torch-audit, torchmortem and training-doctor on the same cases, each watching a run as its README shows.

A peer's warnings (nothing that it calls information, and no hint about speed alone) stand for every disease that a
generous reader could take them for, joined by "|": its answer is right if one of them is. Of several warnings the most
severe is on top.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from knep.doctor.subject.setup import Patient
from knep.doctor.trials import run, scoring
from knep.optim.param_groups import decayed

Answers = list[tuple[str, str]]  # diseases joined by "|", and the peer's words
STEPS, LOOK = 400, 20

_RATE_HIGH = (
    "lr_too_high|momentum_instability|exploding_gradient|loss_spikes|unscaled_inputs|non_finite_inputs|no_decay"
)
_SLOW = (
    "lr_too_low|clip_throttles|too_little_capacity|too_much_smoothing|too_much_penalty|weight_decay_too_large"
    "|too_much_dropout|too_much_augment|vanishing_gradient|symmetric_weights|signal_collapse|constant_inputs"
    "|unrelated_labels|stopping_too_early|double_softmax|precision_underflow|sorted_batches"
)
_OVERFIT = (
    "overfitting|too_much_capacity|unrelated_labels|validation_scaled_differently|stale_statistics|labels_off_by_one"
)
_DEAD = "dying_relu|symmetric_weights|signal_collapse|vanishing_gradient|cut_off|frozen_parameters"
_STILL = "lr_too_low|clip_throttles|precision_underflow|frozen_parameters|cut_off|vanishing_gradient"
_AUDIT = {
    "TA100": "non_finite_inputs|exploding_gradient|lr_too_high|precision_underflow|momentum_instability|loss_spikes"
    "|unscaled_inputs",
    "TA102": _RATE_HIGH,
    "TA103": _DEAD + "|saturation",
    "TA104": "cut_off|frozen_parameters|vanishing_gradient|constant_inputs|symmetric_weights",
    "TA105": _DEAD,
    "TA301": "unscaled_inputs|loss_spikes|validation_scaled_differently|non_finite_inputs",
    "TA302": "constant_inputs|unscaled_inputs",
    "TA304": "tiny_norm_batches|stale_statistics",
    "TA305": "non_finite_inputs",
    "TA405": _DEAD,
    "TA500": "cut_off",
    "TA501": "stale_statistics",
}
_MORTEM = {
    "Vanishing gradients": "vanishing_gradient|saturation|signal_collapse|dying_relu|symmetric_weights",
    "Exploding gradients": _RATE_HIGH,
    "Gradient stalling": "vanishing_gradient|clip_throttles|constant_inputs|precision_underflow|constant_labels|"
    + _DEAD,
    "Dead units": _DEAD,
    "Activation saturation": "saturation|unscaled_inputs|vanishing_gradient",
    "Update ratio too low": _STILL,
    "Update ratio too high": "weight_decay_too_large|" + _RATE_HIGH,
    "Training divergence": _RATE_HIGH,
    "Loss plateau": _SLOW,
    "Catapult phase": _RATE_HIGH,
    "Edge of stability": _RATE_HIGH,
    "Rank collapse": "signal_collapse|symmetric_weights|too_little_capacity|dying_relu|constant_inputs",
    "Weight norm explosion": "exploding_gradient|lr_too_high|momentum_instability",
    "Stagnant weight norms": "stopping_too_early|" + _STILL,
    "Inter-layer weight norm": "exploding_gradient|vanishing_gradient|weight_decay_too_large|saturation",
    "High gradient noise": "tiny_norm_batches|unrelated_labels|lr_too_high|sorted_batches|class_imbalance|no_decay",
}
_DOCTOR = {
    "Learning rate likely too high": _RATE_HIGH,
    "Learning rate may be too low": _SLOW,
    "Training plateau": _SLOW,
    "Early training plateau": _SLOW,
    "Overfitting": _OVERFIT,
    "Unusual train/eval": "leaked_validation|too_much_dropout|too_much_augment|" + _OVERFIT,
    "Gradient instability": _RATE_HIGH,
    "Possible mixed precision": "precision_underflow|" + _RATE_HIGH,
}


class TorchAudit:
    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        from torch_audit import Auditor  # pyright: ignore[reportMissingImports]

        self._auditor: Any = Auditor(model, optimizer=optimizer, every_n_steps=LOOK)
        self._auditor.__enter__()
        self._auditor.audit_static()
        self._auditor.audit_init()

    def forward(self, x: Tensor) -> Tensor:
        return self._auditor.forward(x)

    def backward(self, loss: Tensor) -> None:
        self._auditor.backward(loss)

    def step(self, step: int, facts: dict[str, float]) -> None:
        self._auditor.step = step + 1

    def answers(self) -> Answers:
        self._auditor.__exit__(None, None, None)
        found = [f for f in self._auditor.finish().findings if f.severity.value != "INFO" and f.rule_id in _AUDIT]
        found.sort(key=lambda f: ["FATAL", "ERROR", "WARN"].index(f.severity.value))
        return [(_AUDIT[f.rule_id], f"{f.rule_id} {f.message}") for f in found]


class Torchmortem:
    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        import torchmortem  # pyright: ignore[reportMissingImports]

        # It logs its own failures, and writes a crash report into the current folder at the interpreter's end.
        logging.getLogger("torchmortem").setLevel(logging.CRITICAL)
        self._model = model
        self._autopsy: Any = torchmortem.Autopsy(model, optimizer=optimizer)
        self._autopsy.attach()

    def forward(self, x: Tensor) -> Tensor:
        return self._model(x)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, step: int, facts: dict[str, float]) -> None:
        self._autopsy.step(loss=facts["loss"])

    def answers(self) -> Answers:
        self._autopsy.detach()
        found = sorted(
            (f for f in self._autopsy.get_report().findings if int(f.severity)), key=lambda f: -int(f.severity)
        )
        return _mapped(_MORTEM, [(f.title, f.summary) for f in found])


class TrainingDoctor:
    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        from training_doctor import Doctor  # pyright: ignore[reportMissingImports]

        self._model = model
        self._doctor: Any = Doctor()
        self._found: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self._model(x)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, step: int, facts: dict[str, float]) -> None:
        self._found += self._doctor.log(step=step, **facts)

    def answers(self) -> Answers:
        found = sorted((d for d in self._found if d.severity.value != "info"), key=lambda d: -d.confidence)
        return _mapped(_DOCTOR, [(d.problem, d.explanation) for d in found])


PEERS: dict[str, Callable[[Patient], Answers]] = {
    "torch-audit": lambda patient: watched(patient, TorchAudit),
    "torchmortem": lambda patient: watched(patient, Torchmortem),
    "training-doctor": lambda patient: watched(patient, TrainingDoctor),
}


def watched(patient: Patient, peer: Callable[[nn.Module, Any], Any]) -> Answers:
    """What a peer says of a run of at most 400 steps. An error in training ends the run, and the peer has its say."""
    torch.manual_seed(patient.seed)
    model = copy.deepcopy(patient.model).train()
    optimizer: Any = patient.make_optimizer(model)
    watcher = peer(model, optimizer)
    try:
        _train(patient, model, optimizer, watcher)
    except (RuntimeError, IndexError):
        return watcher.answers()
    return watcher.answers()


def _train(patient: Patient, model: nn.Module, optimizer: Any, watcher: Any) -> None:
    steps = min(patient.total_steps, STEPS)
    per_epoch = max(1, round(steps / patient.epochs))
    scheduler: Any = None
    if patient.make_scheduler is not None and patient.interval == "step":
        scheduler = patient.make_scheduler(optimizer, total_steps=steps, steps_per_epoch=per_epoch)
    batches = run.order(patient)
    facts: dict[str, float] = {}
    for step in range(steps):
        getattr(optimizer, "train", int)()
        x, y = patient.augment(*next(batches), patient.num_classes)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = patient.criterion(watcher.forward(patient.scaling(x)), y)
            watcher.backward(loss + patient.regularization.penalty(decayed(model)))
            facts["loss"] = float(loss.detach())
            facts["grad_norm"] = float(patient.clip([p for p in model.parameters() if p.grad is not None]))
            return loss

        optimizer.step(closure)
        rate = max(float(g["lr"]) for g in optimizer.param_groups)
        patient.regularization.after_step(decayed(model), rate)
        facts["lr"] = rate
        if scheduler is not None:
            scheduler.step()
        facts.pop("eval_loss", None)
        if step % LOOK == LOOK - 1:
            facts["eval_loss"] = scoring.score(patient, model, patient.val[:2]).loss
        watcher.step(step, facts)
        if not math.isfinite(facts["loss"]):
            break


def _mapped(table: dict[str, str], said: list[tuple[str, str]]) -> Answers:
    """The first entry of the table with which a title begins."""
    return [
        (names, f"{title}: {text}") for title, text in said for start, names in table.items() if title.startswith(start)
    ]

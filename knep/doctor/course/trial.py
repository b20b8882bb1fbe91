"""A short training of a subject, on a copy, and how well it answers: as a share of what a constant answer leaves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from knep.doctor.course.skill import skill, stacked_answers
from knep.doctor.subject.any_task import Subject
from knep.doctor.subject.rng_isolation import undisturbed
from knep.utils.rng import generator

_WORK = 2e10  # multiply-adds of a trial, a second or two of one core
_FEWEST, _MOST = 60, 300  # steps
_LOOKS = 4


@dataclass
class Course:
    """losses: of the steps; val: skill at each look; val_losses: there too; train: skill at the end; diverged: a loss
    or a weight was not finite; model: the trained copy."""

    losses: list[float] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    train: float = 0.0
    diverged: bool = False
    model: nn.Module | None = None

    @property
    def reached(self) -> float:
        """Skill on validation at the end, at least that of a constant answer; without validation that on training."""
        if self.diverged:
            return -1.0
        return max(-1.0, self.val[-1] if self.val else self.train)

    @property
    def falls(self) -> bool:
        """Whether the loss still falls clearly when the trial ends."""
        quarter = len(self.losses) // 4
        if not quarter or self.diverged:
            return False
        late, before = (sum(self.losses[-k * quarter :][:quarter]) / quarter for k in (1, 2))
        return late < before - 0.05 * abs(before)

    @property
    def rises(self) -> bool:
        """Whether validation still gets better when the trial ends."""
        return len(self.val) > 1 and self.val[-1] > self.val[-2] + 0.02


@dataclass(frozen=True)
class Remedy:
    """rate: of the learning rate; inputs, output: changes of what the model reads and of what it gives, in the units of
    the data; loss: another one; dropout: times its share in layers of it; decay: of the weights, in all groups."""

    rate: float = 1.0
    inputs: Callable[[Tensor], Tensor] | None = None
    output: tuple[Tensor, Tensor] | None = None
    loss: Any = None
    dropout: float = 1.0
    decay: float | None = None


def steps_of(subject: Subject) -> int:
    """How many steps a trial takes, by what the model costs and not by the clock."""
    parameters = sum(p.numel() for p in subject.model.parameters())
    x = next(iter(_tensors(subject.train[0])), None)
    places = 1 if x is None or x.ndim < 3 else x[0].numel() // x.shape[1]
    rows = subject.rows(subject.train[0])
    places = max(places, x.shape[1] if x is not None and not x.is_floating_point() and x.ndim > 1 else 1)
    cost = max(1.0, 6.0 * parameters * rows * min(places, 4096))
    if any(isinstance(m, nn.RNNBase) for m in subject.model.modules()):
        cost += 4e6 * places  # one step after the other
    return int(min(max(_FEWEST, min(_MOST, _WORK / cost)), max(1, subject.epochs * subject.steps)))


def _tensors(value: Any) -> list[Tensor]:
    from knep.doctor.subject.any_batch import tensors

    return list(tensors(value))


class Changed(nn.Module):
    """A model that reads changed inputs and gives changed outputs."""

    def __init__(self, model: nn.Module, remedy: Remedy) -> None:
        super().__init__()
        self.model, self._remedy = model, remedy

    def forward(self, x: Tensor) -> Any:
        x = x if self._remedy.inputs is None else self._remedy.inputs(x)
        output = self.model(x)
        if self._remedy.output is None:
            return output
        mean, size = self._remedy.output
        return output * size.to(output) + mean.to(output)


def train(subject: Subject, steps: int, remedy: Remedy | None = None) -> Course:
    """Trains a copy with the subject's optimizer and loss, or with a remedy, always on the same batches."""
    remedy = remedy or Remedy()
    course = Course()
    with undisturbed(subject.seed, *subject.loaders):
        model = copy.deepcopy(subject.model).train()
        for m in model.modules():
            if isinstance(m, _DropoutNd):
                m.p *= remedy.dropout
        optimizer: Any = subject.make_optimizer(model)
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = group["lr"] * remedy.rate
            if remedy.decay is not None:
                group["weight_decay"] = remedy.decay
        asked: nn.Module = model
        if remedy.inputs is not None or remedy.output is not None:
            asked = Changed(model, remedy)
        course.model = asked
        _steps(subject, course, asked, optimizer, steps, remedy)
    return course


def _steps(subject: Subject, course: Course, model: nn.Module, optimizer: Any, steps: int, remedy: Remedy) -> None:
    looks = {max(1, round(steps * (i + 1) / _LOOKS)) for i in range(_LOOKS)}
    order: list[int] = []
    weight = None if remedy.output is None else float(remedy.output[1].square().mean())
    for step in range(steps):
        if not order:
            order = torch.randperm(len(subject.train), generator=generator(subject.seed, step)).tolist()
        batch = subject.train[order.pop()]
        target = subject.parts(batch)[1]

        def closure(batch: Any = batch, target: Any = target) -> Tensor:
            optimizer.zero_grad()
            output = subject.answer(model, batch)
            loss = subject.value(output, target) if remedy.loss is None else remedy.loss(output, target)
            loss = loss if weight is None else loss / weight
            if loss.requires_grad:
                loss.backward()
            return loss.detach()

        loss = optimizer.step(closure)
        course.losses.append(float(loss))
        if not math.isfinite(course.losses[-1]):
            course.diverged = True
            break
        if step + 1 in looks and subject.val:
            look(subject, course, model)
    course.diverged |= not all(bool(p.isfinite().all()) for p in model.parameters())
    model.eval()
    if not course.diverged:
        course.train = skill(subject, *stacked_answers(subject, model, subject.train[:8]))


def look(subject: Subject, course: Course, model: nn.Module) -> None:
    """Notes the skill and the loss on validation."""
    model.eval()
    answers = stacked_answers(subject, model, subject.val[:16])
    course.val.append(skill(subject, *answers))
    course.val_losses.append(_loss(subject, model, subject.val[:8]))
    model.train()


def _loss(subject: Subject, model: nn.Module, batches: Sequence[Any]) -> float:
    with torch.no_grad():
        values = [float(subject.value(subject.answer(model, b), subject.parts(b)[1])) for b in batches]
    return sum(values) / max(1, len(values))

"""Remedies: each makes of a patient another one that lacks the cause, to see by a trial whether that was it.

A remedy is `f(patient) -> Patient`; it edits copies only. With what a user types for it, it is a treatment; those that
ask for no numbers of a patient are at the end, by the lines of diseases.yaml.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from knep.doctor.findings import diseases
from knep.doctor.model.signal_pass import widened
from knep.doctor.subject.batches import Batch
from knep.doctor.subject.setup import Patient
from knep.errors import InputError
from knep.recipes import activation, augment, clip, init, norm, scheduler
from knep.recipes.recipe import Recipe
from knep.recipes.regularization import Regularizer

Remedy = Callable[[Patient], Patient]
Treatment = tuple[tuple[str, ...], Remedy]  # override lines, and the remedy that does the same to a patient


def with_groups(edit: Callable[[dict[str, Any]], None]) -> Remedy:
    """The same optimizer with edited parameter groups."""

    def remedy(patient: Patient) -> Patient:
        def make(model: nn.Module) -> torch.optim.Optimizer:
            optimizer = patient.make_optimizer(model)
            for group in optimizer.param_groups:
                edit(group)
            return optimizer

        return replace(patient, make_optimizer=make)

    return remedy


def rate(factor: float) -> Remedy:
    """The learning rate times `factor`: of the config's `optimizer.lr` where a config made the optimizer."""

    def edit(group: dict[str, Any]) -> None:
        group["lr"] = group["lr"] * factor

    def remedy(patient: Patient) -> Patient:
        owner = getattr(patient.make_optimizer, "__self__", None)
        if not isinstance(owner, Recipe) or patient.run is None:
            return with_groups(edit)(patient)
        # Optimizers of two arms have a rate of their own for the other one, which `optimizer.lr` leaves alone.
        node = patient.option("optimizer")
        changed = Recipe.from_config({**patient.run.plain, "optimizer": {**node, "lr": node["lr"] * factor}})
        return replace(patient, make_optimizer=changed.optimizer, make_scheduler=changed.scheduler)

    return remedy


def momentum(value: float = 0.9) -> Remedy:
    """Momentum, or Adam's first beta, of `value` where it is higher."""

    def edit(group: dict[str, Any]) -> None:
        if isinstance(group.get("momentum"), float):
            group["momentum"] = min(group["momentum"], value)
        if "betas" in group:
            group["betas"] = (min(group["betas"][0], value), *group["betas"][1:])

    return with_groups(edit)


def no_weight_decay(patient: Patient) -> Patient:
    def edit(group: dict[str, Any]) -> None:
        if group.get("weight_decay"):
            group["weight_decay"] = 0.0

    return with_groups(edit)(patient)


def clipped(theta: float) -> Remedy:
    """Gradients shortened to length theta."""
    return lambda patient: replace(patient, clip=lambda parameters: clip.norm(parameters, theta=theta))


def no_penalty(patient: Patient) -> Patient:
    """No penalty, but the same label smoothing."""
    plain = Regularizer()
    plain.label_smoothing = patient.regularization.label_smoothing
    return replace(patient, regularization=plain)


def no_smoothing(patient: Patient) -> Patient:
    gentle = copy.copy(patient.regularization)
    gentle.label_smoothing = 0.0
    loss = patient.loss
    if isinstance(loss, nn.CrossEntropyLoss):
        loss = nn.CrossEntropyLoss(weight=loss.weight)
    return replace(patient, regularization=gentle, loss=loss)


def decay(patient: Patient) -> Patient:
    """The learning rate falls to zero along a cosine."""
    return replace(patient, make_scheduler=scheduler.cosine, interval="step")


def longer(factor: int) -> Remedy:
    """More epochs."""
    return lambda patient: replace(patient, epochs=patient.epochs * factor)


def droppers(model: nn.Module) -> list[Any]:
    """Modules that drop a share `p` of their input while training."""
    return [
        m for m in model.modules() if "drop" in type(m).__name__.lower() and isinstance(getattr(m, "p", None), float)
    ]


def standardized(patient: Patient) -> Patient:
    """Inputs of mean 0 and deviation 1 per channel, over what the model saw before."""
    x = patient.inputs(patient.stacked(most=1024)[0]).float()
    axes = [0, *range(2, x.ndim)]
    mean, std = x.mean(axes, keepdim=True), x.std(axes, keepdim=True).clamp_min(1e-6)
    return replace(patient, scaling=nn.Sequential(patient.scaling, _Affine(mean, std)))


class _Affine(nn.Module):
    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self._mean, self._std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self._mean) / self._std


def full_precision(patient: Patient) -> Patient:
    return replace(
        patient, precision="32-true", model=widened(copy.deepcopy(patient.model)), scaling=_Float(patient.scaling)
    )


class _Float(nn.Module):
    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self._before = before

    def forward(self, x: Tensor) -> Tensor:
        return self._before(x).float()


def lively_statistics(patient: Patient) -> Patient:
    """Batch norm that keeps up: momentum 0.1, running statistics kept and renewed."""
    model = copy.deepcopy(patient.model)
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            m.momentum = 0.1
            m.train()
    return replace(patient, model=model)


def edited(*edits: Callable[..., Any]) -> Remedy:
    """The model with slots of knep applied to a copy, in order. Raises InputError where they do not fit it."""

    def remedy(patient: Patient) -> Patient:
        model = copy.deepcopy(patient.model)
        sample = patient.inputs(patient.train[0][0][:64])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(patient.seed)
            for edit in edits:
                edit(model, sample=sample)
        return replace(patient, model=model)

    return remedy


def zero_biases(model: nn.Module, *, sample: Tensor | None = None) -> None:
    """Biases of linear layers and convolutions start at 0."""
    for m in model.modules():
        bias = getattr(m, "bias", None)
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) and isinstance(bias, Tensor):
            nn.init.zeros_(bias)


def inits(patient: Patient) -> list[Treatment]:
    """Ways to a sound start, with the override lines that say the same: by the model's own activations."""
    squash = any(isinstance(m, (nn.Tanh, nn.Sigmoid)) for m in patient.model.modules())
    first: tuple[str, Any] = (
        ("init=glorot_normal", init.glorot_normal) if squash else ("init=he_normal", init.he_normal)
    )
    normed = [m for m in patient.model.modules() if "norm" in type(m).__name__.lower()]
    ways: list[Treatment] = [((first[0],), edited(zero_biases, first[1]))]
    if not normed:
        insert = partial(norm.batch, insert=True)
        ways.append(((first[0], "norm=batch", "norm.insert=true"), edited(zero_biases, first[1], insert)))
        relu: tuple[str, ...] = ("activation=relu", "init=he_normal", "norm=batch", "norm.insert=true")
        if squash:
            ways.append((relu, edited(activation.relu, zero_biases, init.he_normal, insert)))
    elif squash:
        ways.append((("activation=relu", "init=he_normal"), edited(activation.relu, zero_biases, init.he_normal)))
    return ways


def merged(size: int) -> Remedy:
    """Batches of about `size` images, made of the patient's own."""

    def remedy(patient: Patient) -> Patient:
        count = max(1, size // max(1, len(patient.train[0][0])))
        train = [_merge(patient.train[i : i + count]) for i in range(0, len(patient.train), count)]
        return replace(patient, train=train, batches=max(1, patient.batches // count))

    return remedy


def _merge(batches: Sequence[Batch]) -> Batch:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def applied(remedy: Remedy, patient: Patient) -> Patient | None:
    """The treated patient, or None where the remedy does not fit it."""
    try:
        return remedy(patient)
    except InputError:
        return None


# Override lines -> the remedy that does the same to a patient.
_SAME: Mapping[tuple[str, ...], Remedy] = {
    ("scaling=standardize",): standardized,
    ("norm=group",): edited(norm.group),
    ("norm=batch", "norm.momentum=0.1"): lively_statistics,
    ("data.batch_size=64",): merged(64),
    ("trainer.precision=32-true",): full_precision,
    ("clip=none",): lambda patient: replace(patient, clip=clip.none),
    ("regularization=label_smoothing", "regularization.epsilon=0.1"): no_smoothing,
    ("regularization=none",): no_penalty,
    ("augment=none",): lambda patient: replace(patient, augment=augment.none()),
}


def by_lines(*lines: str) -> Treatment:
    return lines, _SAME[lines]


def prescribed(disease: str) -> tuple[Treatment, ...]:
    """What diseases.yaml prescribes, as far as a trial can go that way."""
    return tuple(by_lines(*way) for way in diseases()[disease].overrides if way in _SAME)

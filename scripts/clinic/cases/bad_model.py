"""Mutations of a patient's model, optimizer and augmentation. Each gives another patient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.doctor.subject.setup import Patient, of

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def edited(patient: Patient, edit: Callable[[nn.Module], None]) -> Patient:
    """The same with an edited copy of its model."""
    model = copy.deepcopy(patient.model)
    with torch.no_grad():
        edit(model)
    return replace(patient, model=model)


def layers(model: nn.Module) -> list[Any]:
    """Linear and convolutional layers in the order in which they were defined."""
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def weights_times(patient: Patient, factor: float = 3.0, last: bool = False) -> Patient:
    """Weights of the hidden layers, and of the last one if asked, times a factor."""

    def edit(model: nn.Module) -> None:
        for layer in layers(model)[: None if last else -1]:
            layer.weight.mul_(factor)

    return edited(patient, edit)


def hidden_biases(patient: Patient, value: float = -3.0) -> Patient:
    """Every bias of the hidden layers at one value."""

    def edit(model: nn.Module) -> None:
        for layer in layers(model)[:-1]:
            layer.bias.fill_(value)

    return edited(patient, edit)


def equal_weights(patient: Patient, value: float = 0.01, last: bool = True) -> Patient:
    """Every weight at one value, biases at 0."""

    def edit(model: nn.Module) -> None:
        for layer in layers(model)[: None if last else -1]:
            layer.weight.fill_(value)
            if layer.bias is not None:
                layer.bias.zero_()

    return edited(patient, edit)


def equal_units(patient: Patient) -> Patient:
    """The units of each hidden layer are copies of its first, and the last layer reads them alike."""

    def edit(model: nn.Module) -> None:
        for layer in layers(model):
            layer.weight.copy_(layer.weight[:1].expand_as(layer.weight).clone())
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[:1].expand_as(layer.bias).clone())
        last = layers(model)[-1]
        last.weight.copy_(last.weight.mean(1, keepdim=True).expand_as(last.weight).clone())

    return edited(patient, edit)


class Ended(nn.Module):
    """A model with a module behind its scores."""

    def __init__(self, model: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.model, self.end = model, end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.model(x))


def softmax_end(patient: Patient, times: int = 1) -> Patient:
    """Softmax at the end, before a loss that applies it."""
    return replace(patient, model=Ended(copy.deepcopy(patient.model), nn.Sequential(*[nn.Softmax(dim=1)] * times)))


def sigmoid_end(patient: Patient) -> Patient:
    """Sigmoid at the end, before a loss that applies softmax."""
    return replace(patient, model=Ended(copy.deepcopy(patient.model), nn.Sigmoid()))


def frozen(patient: Patient, first: int = 0, last: int | None = -1) -> Patient:
    """requires_grad=False for the weights and biases of some layers."""

    def edit(model: nn.Module) -> None:
        for layer in layers(model)[first:last]:
            layer.requires_grad_(False)

    return edited(patient, edit)


def _some(model: nn.Module, keep: str) -> list[Tensor]:
    own = {"head": layers(model)[-1:], "tail": layers(model)[-2:], "first": layers(model)[:1]}
    if keep == "biases":
        return [p for p in model.parameters() if p.ndim == 1]
    return [p for layer in own[keep] for p in layer.parameters()]


def partly_optimized(patient: Patient, keep: str = "head") -> Patient:
    """The optimizer has some parameters only: head, tail (two layers), first or biases."""

    def make(model: nn.Module) -> Optimizer:
        optimizer = patient.make_optimizer(model)
        kept = {id(p) for p in _some(model, keep)}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in kept]
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        return optimizer

    return replace(patient, make_optimizer=make)


def slow_statistics(patient: Patient, momentum: float = 1e-4) -> Patient:
    """Batch norm follows its statistics with this momentum."""

    def edit(model: nn.Module) -> None:
        for m in model.modules():
            if isinstance(m, _NORMS):
                m.momentum = momentum

    return edited(patient, edit)


class Narrow(nn.Module):
    """A model whose weights and signals have a narrow number format; float32 outside."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype)).float()


def narrow(patient: Patient, dtype: torch.dtype = torch.float16) -> Patient:
    """model.half() or model.bfloat16(): the updates are rounded to the format of the weights."""
    return replace(patient, model=Narrow(copy.deepcopy(patient.model), dtype))


class Noise(nn.Module):
    """Grey levels of noise on training images; epoch: as every augmentation has it."""

    epoch = 0

    def __init__(self, deviation: float, permuted: bool = False) -> None:
        super().__init__()
        self.deviation, self.permuted = deviation, permuted

    def forward(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        x = (x.float() + self.deviation * torch.randn(x.shape)).clamp(0, 255)
        if self.permuted:
            x = x.flatten(2)[..., torch.randperm(x[0, 0].numel())].view_as(x)
        return x, y


def noisy(patient: Patient, deviation: float = 200.0, permuted: bool = False) -> Patient:
    """Augments by noise, or by shuffling pixels."""
    return replace(patient, augment=Noise(deviation, permuted))


def own_loop(patient: Patient, make: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam) -> Patient:
    """The same model and images in a project without knep: scaled float tensors and torch's own optimizer."""
    with torch.no_grad():
        train = [(patient.scaling(x), y) for x, y in patient.train]
        val = [(patient.scaling(x), y) for x, y in patient.val]
    made = of(
        copy.deepcopy(patient.model),
        train,
        val,
        optimizer=lambda model: make(model.parameters()),
        epochs=patient.epochs,
    )
    return replace(made, shuffled=True)

"""Dropout wherever a model has it: as modules, as a setting of attention and recurrent layers, as functions called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from knep.doctor.model.signal_pass import chosen, forward, isolated, like
from knep.doctor.subject.copies import copied
from knep.doctor.subject.setup import Patient
from knep.doctor.trials.remedies import Remedy, droppers
from knep.surgery.record import Recorder, name_of, surround

_FUNCTIONS = {
    "dropout": "p", "dropout1d": "p", "dropout2d": "p", "dropout3d": "p", "alpha_dropout": "p",
    "feature_alpha_dropout": "p", "scaled_dot_product_attention": "dropout_p",
}  # fmt: skip
_INSIDE = (nn.MultiheadAttention, nn.RNNBase)  # have a float `dropout`


class _Dropouts(Recorder):
    """rates: of the functions called, while training; each is lowered to `most`."""

    def __init__(self, most: float = 1.0) -> None:
        super().__init__()
        self.most, self.rates = most, list[float]()

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = _FUNCTIONS.get(name_of(func))
        if key in kwargs and kwargs.get("training", True):
            self.rates.append(float(kwargs[key]))
            kwargs[key] = min(kwargs[key], self.most)
        return func(*args, **kwargs)


def settings(model: nn.Module) -> list[float]:
    """Rates of the model's modules."""
    return [m.p for m in droppers(model)] + [m.dropout for m in model.modules() if isinstance(m, _INSIDE)]


def functional(patient: Patient) -> list[float]:
    """Rates with which the forward pass calls dropout as a function, without those of its modules."""
    twin = _lowered(copied(patient.model), 0.0).train()
    x, _ = chosen(patient, 16)
    with torch.no_grad(), isolated(patient), _Dropouts() as seen:
        forward(twin, like(twin, patient.inputs(x)))
    return [p for p in seen.rates if p > 0]


def capped(p: float) -> Remedy:
    """Every dropout drops at most a share p."""

    def remedy(patient: Patient) -> Patient:
        model = _lowered(copied(patient.model), p)
        if any(rate > p for rate in functional(patient)):
            surround(model, lambda: _Dropouts(p))
        return replace(patient, model=model)

    return remedy


def _lowered(model: nn.Module, p: float) -> nn.Module:
    for m in droppers(model):
        m.p = min(m.p, p)
    for m in model.modules():
        if isinstance(m, _INSIDE):
            m.dropout = min(m.dropout, p)
    return model

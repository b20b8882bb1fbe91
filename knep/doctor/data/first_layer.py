"""What the first layer with weights gets: a model may scale or normalise its input by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from knep.doctor.model.signal_pass import like
from knep.doctor.subject.setup import Patient
from knep.surgery.check_forward import probe
from knep.surgery.record import hooked, mode

_IMAGES = 16
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_KINDS = (_ConvNd, nn.Linear, nn.Embedding)  # also where a parametrization makes them no leaves


@dataclass(frozen=True)
class Entrance:
    """layer: path of the first module with own parameters ("" where there is none); x: its input for a few training
    images; own: whether that is not the model's input itself; normalises: that module is a normalisation, or one
    follows at once and undoes any scale; tokens: the input are indices of an embedding, which have no scale.
    """

    layer: str
    x: Tensor | None
    own: bool
    normalises: bool
    tokens: bool


class _Enough(Exception):
    """The first two layers were seen."""


def entrance(patient: Patient) -> Entrance:
    """Runs the model's first layers on 16 training images. Raises InputError where the model fails on them."""
    x = patient.inputs(patient.stacked(most=_IMAGES)[0])
    met = _first_layers(patient.model, like(patient.model, x))
    if not met:
        return Entrance("", None, False, False, False)
    path, layer, got = met[0]
    follows = len(met) > 1 and isinstance(met[1][1], _NORMS) and not isinstance(layer, _NORMS)
    own = got.shape != x.shape or not torch.equal(got, x.to(got.dtype))
    tokens = isinstance(layer, nn.Embedding) or not got.is_floating_point()
    return Entrance(path, got.float().cpu(), own, isinstance(layer, _NORMS) or follows, tokens)


def _first_layers(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    met: list[tuple[str, nn.Module, Tensor]] = []
    paths = {m: path for path, m in model.named_modules() if _acts(m)}

    def enter(module: nn.Module, inputs: tuple[object, ...], named: object) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            met.append((paths[module], module, inputs[0].detach().clone()))
        if len(met) == 2:
            raise _Enough

    try:
        with torch.no_grad(), mode(model, False), hooked(paths, enter):
            model(x)
    except _Enough:
        pass
    except Exception:  # another's forward may raise anything: the probe tells it in one line
        probe(model, x)
        raise
    return met


def _acts(module: nn.Module) -> bool:
    own = next(module.parameters(recurse=False), None) is not None
    return isinstance(module, (*_NORMS, *_KINDS)) or (own and next(module.children(), None) is None)

"""One forward and one backward pass of a patient at a moment, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from knep.doctor.subject.batches import Batch
from knep.doctor.subject.copies import copied
from knep.doctor.subject.setup import Patient
from knep.errors import InputError
from knep.observe.function_tape import Tape
from knep.observe.rows import Scores, Signals, Weight
from knep.surgery.check_forward import probe

_FEWEST, _MOST = 16, 128  # images
_MACS = 4e9  # multiply-adds of a forward pass: about a second of one core with its backward pass
_NOISE = ("drop", "stochasticdepth", "noise")


def signals(
    patient: Patient, model: nn.Module | None = None, batch: Batch | None = None, *, standardized: bool = False
) -> Signals:
    """What a forward and a backward pass of the loss show, on a copy of the model, in training mode without dropout.

    model: another state of the patient's model; batch: raw (x, y), by default 16 to 128 training images, by the cost of
    the model, spread over all that the patient has; standardized: brings the scaled images to mean 0 and deviation 1
    first. Weights of half precision are widened to float32.
    Raises InputError for a model that fails, or whose output is not (N, K).
    """
    twin = widened(copied(patient.model if model is None else model)).train()
    still(twin)
    x, y = chosen(patient, affordable(patient, twin)) if batch is None else batch
    device = patient.device
    with isolated(patient):
        images = like(twin, patient.inputs(x))
        if standardized:
            images = images if images.is_floating_point() else images.float()
            images = (images - images.mean()) / images.std().clamp(min=torch.finfo(images.dtype).tiny)
        with Tape(twin, len(images)) as tape:
            output = forward(twin, images)
        loss = patient.criterion(output, y.to(device))
    reached = loss.requires_grad
    if reached:
        loss.backward()
    spread = images.double()
    return Signals(
        layers=tape.layers,
        weights=[_weight(name, p) for name, p in twin.named_parameters()],
        scores=_scores(output, float(loss.detach()), tape, patient.of_classes),
        images=len(images),
        input_mean=float(spread.mean()),
        input_std=float(spread.std(correction=0)),
        reached=reached,
        called=tape.called,
        standardized=standardized,
    )


def widened(model: nn.Module) -> nn.Module:
    """Half precision turned into float32, in place; what the model itself casts is cast back before each layer."""
    for module in model.modules():
        narrow = [t for t in [*module.parameters(False), *module.buffers(False)] if _narrow(t)]
        for tensor in narrow:
            tensor.data = tensor.data.float()
        if narrow:
            module.register_forward_pre_hook(_as_own)
    return model


def _narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _as_own(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs in the dtype of the layer's own weights."""
    own = next(t.dtype for t in [*module.parameters(False), *module.buffers(False)] if t.is_floating_point())
    return tuple(x.to(own) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def still(model: nn.Module) -> None:
    """Modules that only add noise in training are put in eval mode."""
    for module in model.modules():
        name = type(module).__name__.lower()
        if any(word in name for word in _NOISE) and next(module.parameters(), None) is None:
            module.eval()


def like(model: nn.Module, images: Tensor) -> Tensor:
    """In the dtype of the model's weights."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return images if first is None or not images.is_floating_point() else images.to(first.dtype)


@contextmanager
def isolated(patient: Patient) -> Iterator[None]:
    """The generators are the patient's seed's meanwhile, and there is no autocast."""
    device = patient.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        torch.manual_seed(patient.seed)
        yield


def affordable(patient: Patient, model: nn.Module) -> int:
    """Images of a pass, by the multiply-adds that the model needs for one. Raises InputError as `probe` does."""
    images = like(model, patient.inputs(chosen(patient, 2)[0]))
    with torch.no_grad(), isolated(patient), Tape(model, len(images)) as tape:
        probe(model, images)
    macs = sum(layer.features * layer.fan_in for layer in tape.layers)
    return int(min(_MOST, max(_FEWEST, _MACS / max(1, macs))))


def chosen(patient: Patient, most: int) -> Batch:
    """Up to `most` raw training images (N, C, H, W) spread over all, finite, with labels that scores exist for."""
    x, y = patient.stacked("train")
    known = (y >= 0) & (y < patient.num_classes)
    finite = x.flatten(1).isfinite().all(1)
    use = known & finite if bool((known & finite).any()) else finite
    if not bool(use.any()):
        raise InputError(f"none of {len(x)} training images has only finite numbers: signals cannot be examined")
    x, y = x[use], y[use]
    index = torch.linspace(0, len(x) - 1, min(most, len(x))).round().long()
    return x[index], y[index].clamp(min=0) % patient.num_classes


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """Scores (N, K). Raises InputError as `probe` does, and for any other output."""
    try:
        output = model(images)
    except InputError:
        raise
    except Exception as error:  # another's forward may raise anything
        text = " ".join(str(error).split())
        raise InputError(
            f"the model fails in training mode on {tuple(images.shape)}: {type(error).__name__}: {text}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or output.is_complex() or output.is_sparse:
        got = f"{tuple(output.shape)} of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        mend = ": return the scores alone (torchvision: aux_logits=False)" if isinstance(output, (tuple, dict)) else ""
        raise InputError(
            f"the model gives {got} for {len(images)} images in training mode, not real scores (N, K){mend}"
        )
    return output


def _weight(name: str, p: nn.Parameter) -> Weight:
    row = Weight(name, p.ndim, p.numel(), length(p.detach()), None, 1.0, p.requires_grad)
    if p.grad is not None:
        g = p.grad.to_dense() if p.grad.is_sparse else p.grad
        row.gradient, row.zeros = length(g), 1 - float(g.count_nonzero()) / max(1, g.numel())
    return row


def length(t: Tensor) -> float:
    """Euclidean norm; squares below what float32 holds are summed in float64."""
    norm = float(t.norm())
    return norm if 1e-15 < norm < 1e15 else float(t.double().norm())


def _scores(output: Tensor, loss: float, tape: Tape, of_classes: bool) -> Scores:
    s = output.detach().double()
    chance = math.log(max(2, s.shape[1])) if of_classes else 0.0
    row = Scores(float(s.mean()), float(s.std(correction=0)), loss, chance)
    if not bool(s.isfinite().all()):
        return row
    last = tape.last
    if last is not None and last[1].numel() == s.numel() and torch.equal(last[1].detach().flatten(), output.flatten()):
        row.last = last[0]
        row.flat = last[1].ndim == 2
    if bool((s >= 0).all()) and _ones(s.sum(1)):
        row.ends = "probabilities"
    elif bool((s >= 0).all()) and len(s) > 2 and _ones(s.sum(0)) and row.last == "softmax":
        row.ends, row.axis = "probabilities", 0
    elif bool((s <= 0).all()) and _ones(s.exp().sum(1)):
        row.ends = "log-probabilities"
    elif bool((s == s[:1]).all()):
        row.ends = "constant"
    elif bool(((s > 0) & (s < 1)).all()):
        row.ends = "unit interval"
    return row


def _ones(sums: Tensor) -> bool:
    return bool((sums - 1).abs().max() < 1e-3)

"""Mutations of a patient's data: what is broken in files, labels and loaders. Each gives another patient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from knep.doctor.subject.batches import Batch
from knep.doctor.subject.setup import Patient
from knep.utils.rng import generator


def joined(batches: list[Batch] | tuple[Batch, ...]) -> Batch:
    """All images (N, C, H, W) and labels (N,)."""
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def cut(x: Tensor, y: Tensor, size: int) -> list[Batch]:
    """Whole batches in the order given; at least one."""
    last = max(1, len(x) // size) * size
    return [(x[i : i + size], y[i : i + size]) for i in range(0, min(last, len(x)), size)]


def _train(patient: Patient, change: Callable[[Tensor, Tensor], Batch], shuffled: bool | None = None) -> Patient:
    x, y = change(*joined(list(patient.train)))
    batches = cut(x, y, len(patient.train[0][0]))
    kept = patient.shuffled if shuffled is None else shuffled
    return replace(patient, train=batches, images=len(x), batches=len(batches), shuffled=kept)


def _val(patient: Patient, change: Callable[[Tensor, Tensor], Batch]) -> Patient:
    x, y = change(*joined(list(patient.val)))
    return replace(patient, val=cut(x, y, len(patient.val[0][0])))


def rescaled(patient: Patient, factor: float = 1.0, offset: float = 0.0) -> Patient:
    """Images times factor plus offset, in deviations of the scaled input, in both splits, behind the scaling."""
    scaling = torch.nn.Sequential(patient.scaling, _Affine(factor, offset))
    return replace(patient, scaling=scaling)


class _Affine(torch.nn.Module):
    def __init__(self, factor: float, offset: float) -> None:
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


def holes(patient: Patient, share: float = 0.02, value: float = float("nan"), pixels: int = 1) -> Patient:
    """A few pixels of a share of the training images are NaN or infinite."""

    def change(x: Tensor, y: Tensor) -> Batch:
        x = x.float()
        hit = torch.randperm(len(x), generator=generator(5))[: max(1, int(share * len(x)))]
        x.flatten(1)[hit, :pixels] = value
        return x, y

    return _train(patient, change)


def blank(patient: Patient, value: int = 0, copies: bool = False) -> Patient:
    """Every image, in both splits, is one grey or a copy of the first."""
    first = patient.train[0][0][:1]

    def change(x: Tensor, y: Tensor) -> Batch:
        return (first.expand_as(x).clone() if copies else torch.full_like(x, value)), y

    return _val(_train(patient, change), change)


def one_label(patient: Patient, label: int = 0) -> Patient:
    """Every training label is the same."""
    return _train(patient, lambda x, y: (x, torch.full_like(y, label)))


def strange_labels(patient: Patient, label: int | None = None, share: float = 0.01) -> Patient:
    """A share of the training labels is a number that no output has; None is the number of outputs."""
    wrong = patient.num_classes if label is None else label

    def change(x: Tensor, y: Tensor) -> Batch:
        y = y.clone()
        y[torch.randperm(len(y), generator=generator(6))[: max(1, int(share * len(y)))]] = wrong
        return x, y

    return _train(patient, change)


def shifted_labels(patient: Patient, by: int = 1, split: str = "train", wrap: bool = True) -> Patient:
    """Labels of one split, or of both, are moved on; without wrap the last class is out of range."""

    def change(x: Tensor, y: Tensor) -> Batch:
        return x, ((y + by) % patient.num_classes if wrap else y + by)

    patient = _train(patient, change) if split in ("train", "both") else patient
    return _val(patient, change) if split in ("val", "both") else patient


def shuffled_labels(patient: Patient, share: float = 1.0) -> Patient:
    """A share of the training labels are dealt out anew among themselves."""

    def change(x: Tensor, y: Tensor) -> Batch:
        y = y.clone()
        hit = torch.randperm(len(y), generator=generator(7))[: int(share * len(y))]
        y[hit] = y[hit][torch.randperm(len(hit), generator=generator(8))]
        return x, y

    return _train(patient, change)


def late_labels(patient: Patient, by: int = 1) -> Patient:
    """Each image has the label of one that comes some places before it, as after two readers fall out of step."""
    return _train(patient, lambda x, y: (x, y.roll(by)))


def rare(patient: Patient, classes: int = 5, keep: float = 0.03) -> Patient:
    """Of the first classes a share is kept, at least one image of each."""

    def change(x: Tensor, y: Tensor) -> Batch:
        stays = y >= classes
        for label in range(classes):
            index = (y == label).nonzero().flatten()
            stays[index[: max(1, int(keep * len(index)))]] = True
        return x[stays], y[stays]

    return _train(patient, change)


def sorted_by_class(patient: Patient, blocks: int = 1) -> Patient:
    """The loader does not shuffle and the files lie by class, once or in a few blocks."""

    def change(x: Tensor, y: Tensor) -> Batch:
        parts = [part[y[part].argsort(stable=True)] for part in torch.arange(len(y)).chunk(blocks)]
        index = torch.cat(parts)
        return x[index], y[index]

    return _train(patient, change, shuffled=False)


def leaked(patient: Patient, share: float = 1.0) -> Patient:
    """A share of the validation images are training images."""
    x, y = joined(list(patient.train))

    def change(val_x: Tensor, val_y: Tensor) -> Batch:
        count = int(share * len(val_x))
        return torch.cat([x[:count], val_x[count:]]), torch.cat([y[:count], val_y[count:]])

    return _val(patient, change)


def copied(patient: Patient, share: float = 1.0) -> Patient:
    """A share of the validation images are in the training split too."""
    more_x, more_y = joined(list(patient.val))
    count = int(share * len(more_x))
    mixed = torch.randperm(sum(len(b[1]) for b in patient.train) + count, generator=generator(9))
    return _train(patient, lambda x, y: (torch.cat([x, more_x[:count]])[mixed], torch.cat([y, more_y[:count]])[mixed]))


def odd_validation(patient: Patient, factor: float = 1.0, offset: float = 0.0, invert: bool = False) -> Patient:
    """Validation images alone go through another arithmetic: factor and offset (grey levels), or are inverted."""
    return _val(patient, lambda x, y: ((255.0 - x.float() if invert else x.float() * factor + offset), y))


def outliers(patient: Patient, count: int = 2, factor: float = 1000.0) -> Patient:
    """So many training batches have images many times too bright."""
    batches = [(x.float(), y) for x, y in patient.train]
    for i in range(count):
        at = len(batches) * (2 * i + 1) // (2 * count)
        batches[at] = (batches[at][0] * factor, batches[at][1])
    return replace(patient, train=batches, shuffled=False)


def outlier_images(patient: Patient, every: int = 300, factor: float = 3000.0) -> Patient:
    """Every so many training images one is many times too bright."""

    def change(x: Tensor, y: Tensor) -> Batch:
        x = x.float()
        x[every // 2 :: every] *= factor
        return x, y

    return _train(patient, change)

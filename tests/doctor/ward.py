"""Small data sets, sound and then made sick, as patients."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from knep.doctor.subject.batches import Batch
from knep.doctor.subject.setup import Patient, of
from knep.utils.rng import generator

DIGITS = load_digits()


def digits(count: int = 1200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training images (count, 1, 8, 8) in [0, 1], labels, 300 of validation, labels), in random order."""
    x = torch.from_numpy(DIGITS.images).float().div(16)[:, None]
    y = torch.from_numpy(DIGITS.target).long()
    order = torch.randperm(len(x), generator=generator(0, 99))
    x, y = x[order], y[order]
    return x[:count], y[:count], x[1400:1700], y[1400:1700]


def made(count: int, classes: int, noise: float, size: int = 12, channels: int = 1, seed: int = 0):
    """As digits: smooth random prototypes with noise, around 0.5, and a third as many of validation."""
    draw = generator(seed, 98)
    coarse = torch.randn(classes, channels, 4, 4, generator=draw)
    prototypes = 0.5 + 0.2 * nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    y = torch.randint(classes, (count + max(count // 3, 1),), generator=draw)
    x = prototypes[y] + noise * torch.randn(len(y), channels, size, size, generator=draw)
    return x[:count], y[:count], x[count:], y[count:]


def batched(x: Tensor, y: Tensor, size: int = 64) -> list[Batch]:
    return list(zip(x.split(size), y.split(size), strict=True))


def net(x: Tensor, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 16), nn.ReLU(), nn.Linear(16, classes))


def patient(x: Tensor, y: Tensor, v: Tensor, w: Tensor, classes: int = 10, size: int = 64, model=None) -> Patient:
    model = net(x, classes) if model is None else model
    val = batched(v, w, 250) if len(v) else []
    return of(model, batched(x, y, size), val, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))


def without_relation(y: Tensor, share: float, classes: int = 10) -> Tensor:
    """So large a share of the labels drawn anew."""
    draw = generator(7, 97)
    anew = torch.rand(len(y), generator=draw) < share
    return torch.where(anew, torch.randint(classes, y.shape, generator=draw), y)

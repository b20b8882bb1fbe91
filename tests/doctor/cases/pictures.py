"""Classes of pixels, pictures from pictures, and pictures of classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.doctor.cases.ward import Case, adam, draw, loaders, maps


def net(outputs, *behind, width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 5, padding=2), nn.ReLU(),
                         nn.Conv2d(width, outputs, 1), *behind)  # fmt: skip


def data(*parts):
    return loaders(*parts, held=40, batch=20)


def masks_of_one_channel(fixed):
    x, y = maps(seed=1)
    y = y.float()[:, None] if fixed else y.float()
    return Case(net(1), *data(x, y), lambda z, y: (z.sigmoid() - y).square().mean())


def masks_twice(fixed):
    x, y = maps(seed=2)
    return Case(net(1, *([] if fixed else [nn.Sigmoid()])), *data(x, y.float()[:, None]), nn.BCEWithLogitsLoss())


def pixels_softmax_twice(fixed):
    x, y = maps(seed=3, classes=3)
    return Case(net(3, *([] if fixed else [nn.Softmax(1)])), *data(x, y), nn.CrossEntropyLoss())


def softmax_over_rows_of_pixels(fixed):
    x, y = maps(seed=4, classes=3)
    return Case(net(3, nn.LogSoftmax(1 if fixed else 2)), *data(x, y), nn.NLLLoss())


def background_ignored(fixed):
    x, y = maps(seed=5, classes=3)
    return Case(net(3), *data(x, y), nn.CrossEntropyLoss(ignore_index=-100 if fixed else 0))


def view_of_classes(fixed):
    x, y = maps(seed=6, classes=3)

    def loss(z, y):
        z = z.permute(0, 2, 3, 1).reshape(-1, 3) if fixed else z.reshape(-1, 3)
        return F.cross_entropy(z, y.reshape(-1))

    return Case(net(3), *data(x, y), loss)


def masks_of_others(fixed):
    x, y = maps(seed=7)
    y = y if fixed else y[torch.randperm(len(y), generator=draw(2))]
    return Case(net(2), *data(x, y), nn.CrossEntropyLoss(), adam(1e-2), {"epochs": 30})


def spots(fixed):
    """A class of one pixel in a hundred that looks much like the others."""
    g = draw(8)
    y = (torch.rand(200, 12, 12, generator=g) < 0.02).long()
    x = (1.3 * y + 0.7 * torch.randn(200, 12, 12, generator=g))[:, None]
    weight = torch.tensor([1.0, 40.0]) if fixed else None
    return Case(net(2, width=6), *loaders(x, y, held=60, batch=20), nn.CrossEntropyLoss(weight))


class Mix(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.inner, self.fixed = net(2), fixed

    def forward(self, x):
        z = self.inner(x)
        return z if self.fixed else z.view(z.shape[1], z.shape[0], *z.shape[2:]).transpose(0, 1)


def channels_by_view(fixed):
    x, y = maps(seed=9)
    return Case(Mix(fixed), *data(x, y), nn.CrossEntropyLoss())


def restored_behind_relu(fixed):
    x, _ = maps(seed=10)
    noisy = x + 0.2 * torch.randn(x.shape, generator=draw(1))
    return Case(net(1, *([] if fixed else [nn.ReLU()])), *data(noisy, x), nn.MSELoss(), adam(1e-2), {"epochs": 30})


def norm_of_keras(fixed):
    x, y = maps(seed=11)
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(12, momentum=0.1 if fixed else 0.9)
    model = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(12, 2, 5, padding=2))
    return Case(model, *data(x, y), nn.CrossEntropyLoss(), adam(1e-2), {"epochs": 30})


def rate_of_pixels(fixed):
    x, y = maps(seed=12)
    return Case(net(2), *data(x, y), nn.CrossEntropyLoss(), adam(1e-2 if fixed else 1e-6), {"epochs": 30})


def validation_of_bytes(fixed):
    x, y = maps(seed=13)
    train = DataLoader(TensorDataset(x[:120], y[:120]), 20, shuffle=True)
    v = x[120:] if fixed else 255 * x[120:]
    return Case(net(2), train, DataLoader(TensorDataset(v, y[120:]), 20), nn.CrossEntropyLoss())


def weight_of_zero(fixed):
    x, y = maps(seed=14, classes=3)
    weight = torch.tensor([1.0, 1.0 if fixed else 0.0, 1.0])
    return Case(net(3), *data(x, y), nn.CrossEntropyLoss(weight), adam(1e-2), {"epochs": 30})


def masks_moved(fixed):
    x, y = maps(seed=15)
    return Case(net(2), *data(x, y if fixed else y.roll(3, 2)), nn.CrossEntropyLoss())


def masks_of_others_in_the_middle(fixed):
    """Where a class usually is can be learned without looking."""
    g = draw(16)
    x, y = 0.3 * torch.randn(160, 1, 12, 12, generator=g), torch.zeros(160, 12, 12, dtype=torch.long)
    for i, (a, b) in enumerate(torch.randint(3, 6, (160, 2), generator=g).tolist()):
        y[i, a : a + 4, b : b + 4] = 1
        x[i, 0, a : a + 4, b : b + 4] += 1.5
    y = y if fixed else y[torch.randperm(160, generator=g)]
    return Case(net(2), *data(x, y), nn.CrossEntropyLoss(), adam(1e-2), {"epochs": 30})


PICTURES = {
    masks_of_one_channel: "broadcast_shapes", masks_twice: "double_softmax", pixels_softmax_twice: "double_softmax",
    softmax_over_rows_of_pixels: "wrong_axis", background_ignored: "ignored_class", view_of_classes: "scrambled_view",
    masks_of_others: "unrelated_labels", spots: "class_imbalance", channels_by_view: "rows_mixed",
    restored_behind_relu: "unreachable_targets", norm_of_keras: "norm_momentum", rate_of_pixels: "lr_too_low",
    validation_of_bytes: "validation_scaled_differently", weight_of_zero: "ignored_class",
    masks_moved: "unrelated_labels", masks_of_others_in_the_middle: "unrelated_labels",
}  # fmt: skip

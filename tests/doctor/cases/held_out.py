"""Cases that were written after all thresholds were set."""

from __future__ import annotations

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from tests.doctor.cases.ward import Case, adam, chain, draw, loaders, maps, mlp, sgd, table, waves

Row = namedtuple("Row", "features price weight")


def table_of_poisson(fixed):
    """Counts: the model ends in ReLU and the loss takes its logarithm."""
    x, y = table(seed=60)
    y = torch.poisson((y + 1).exp().clamp(max=30), generator=draw(1))[:, None]
    end = [nn.Softplus()] if fixed else [nn.ReLU()]
    loss = lambda out, y: (out + (0 if not fixed else 1e-6) - y * (out + (0 if not fixed else 1e-6)).log()).mean()  # noqa: E731
    return Case(mlp(8, 1, 32, *end), *loaders(x, y), loss, adam(3e-3))


def prices_by_name(fixed):
    """Dicts with a target in a column, squared against a squeezed output."""
    x, y = table(seed=61)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(8, 1)

        def forward(self, features):
            return self.body(features).flatten()

    def named(loader):
        return [{"features": a, "target": b if fixed else b[:, None]} for a, b in loader]

    train, val = loaders(x, y)
    return Case(Net(), named(train), named(val), F.l1_loss)


def positional_softmax(fixed):
    """Attention pooling over rows of the batch instead of places."""

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.gate, self.out = nn.Conv1d(1, 16, 5, padding=2), nn.Linear(16, 1), nn.Linear(16, 3)

        def forward(self, x):
            h = self.conv(x[:, None]).relu().transpose(1, 2)
            return self.out((h * self.gate(h).softmax(1 if fixed else 0)).sum(1))

    x, y = waves(seed=62)
    return Case(Pool(), *loaders(x, y), nn.CrossEntropyLoss(), adam(1e-2))


def sinusoid_places(fixed):
    """Transformer of PyTorch without batch_first."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(12, 16)
            self.inner = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=fixed)
            self.out = nn.Linear(16, 4)

        def forward(self, x):
            return self.out(self.inner(self.table(x)))

    s = chain(seed=63)
    y = (s[:, 1:] * 2 + 1) % 4
    return Case(Net(), *loaders(s[:, 1:], y, held=100), lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))


def transformer_without_mask(fixed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.places = nn.Embedding(12, 16), nn.Embedding(32, 16)
            self.inner, self.out = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True), nn.Linear(16, 12)

        def forward(self, x):
            n = x.shape[1]
            mask = nn.Transformer.generate_square_subsequent_mask(n) if fixed else None
            h = self.table(x) + self.places(torch.arange(n))
            return self.out(self.inner(h, src_mask=mask)).transpose(1, 2)

    s = chain(seed=64)
    return Case(Net(), *loaders(s[:, :-1], s[:, 1:], held=100), nn.CrossEntropyLoss(), adam(1e-2))


def labels_of_one_hot_twice(fixed):
    """Several labels with a focal loss of its own that squashes what is squashed."""
    g = draw(65)
    x = torch.randn(1000, 10, generator=g)
    y = (x @ torch.randn(10, 3, generator=g) > 1).float()

    def focal(z, y):
        p = z.sigmoid()
        return -(y * (1 - p) ** 2 * p.clamp(min=1e-6).log() + (1 - y) * p**2 * (1 - p).clamp(min=1e-6).log()).mean()

    return Case(mlp(10, 3, 32, *([] if fixed else [nn.Sigmoid()])), *loaders(x, y), focal)


def years_as_numbers(fixed):
    """Targets such as 1990, and inputs of many sizes."""
    x, y = table(seed=66)
    y = (8 * y + (1990 if not fixed else 0)).round()[:, None] / (8 if fixed else 1)
    return Case(mlp(8, 1), *loaders(x, y), nn.MSELoss(), sgd(1e-2))


def incomes(fixed):
    x, y = table(seed=67)
    x = x.clone()
    x[:, 1] = x[:, 1] * 20000 + 50000
    x[:, 4] = x[:, 4] * 12 + 40
    x = (x - x.mean(0)) / x.std(0) if fixed else x
    return Case(mlp(8, 1), *loaders(x, (y > 0).float()[:, None]), nn.BCEWithLogitsLoss(), sgd(0.1))


def crawling_binary(fixed):
    x, y = table(seed=68)
    return Case(mlp(8, 1), *loaders(x, (y > 0).float()[:, None]), nn.BCEWithLogitsLoss(), sgd(0.3 if fixed else 1e-5))


def exploding_series(fixed):
    x = torch.randn(900, 20, generator=draw(69)).cumsum(1)
    x, y = x[:, :-1] / 4, x[:, -1:] / 4

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gru, self.out = nn.GRU(1, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, x):
            return self.out(self.gru(x[..., None])[0][:, -1])

    return Case(Net(), *loaders(x, y), nn.MSELoss(), sgd(0.05 if fixed else 40.0))


def weighted_rows(fixed):
    """Named tuples with weights; targets of another row."""
    x, y = table(seed=70)
    y = y if fixed else y[torch.randperm(len(y), generator=draw(2))]
    w = torch.rand(len(y), generator=draw(3)) + 0.5
    train, val = loaders(x, y[:, None], w[:, None])
    loss = lambda out, y, w: ((out - y).square() * w).mean()  # noqa: E731
    return Case(mlp(8, 1), [Row(*b) for b in train], [Row(*b) for b in val], loss, None, {"epochs": 20})


def masks_behind_sigmoid_and_dice(fixed):
    """The target of a mask is 0 and 255."""
    x, y = maps(seed=71)
    y = y.float()[:, None] * (1 if fixed else 255)
    net = nn.Sequential(nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.Conv2d(12, 1, 1), nn.Sigmoid())
    return Case(net, *loaders(x, y, held=40, batch=20), nn.MSELoss(), adam(1e-2), {"epochs": 30})


def rank_norm(fixed):
    """Cosine of rows that are all zero."""
    x, y = table(seed=72)
    x = x.clone()
    x[::25] = 0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.out = nn.Linear(8, 32, bias=False), nn.Linear(32, 1)

        def forward(self, x):
            h = self.first(x)
            return self.out(h / (h.norm(dim=1, keepdim=True) + (0 if not fixed else 1e-6)))

    return Case(Net(), *loaders(x, y.clamp(-2, 2)[:, None] / 2), nn.MSELoss())


class Turned(Dataset):
    """Rows whose columns are dropped at random, to train by."""

    def __init__(self, x, y, drop):
        self.x, self.y, self.drop = x, y, drop

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        keep = torch.rand(self.x[i].shape) > self.drop
        return {"x": self.x[i] * keep, "y": self.y[i]}


def dropped_columns_in_validation(fixed):
    x, y = table(seed=73)
    train = DataLoader(Turned(x[:800], y[:800, None], 0.2), 50, shuffle=True)
    val = DataLoader(Turned(x[800:], y[800:, None], 0.0 if fixed else 0.2), 50)
    return Case(mlp(8, 1), train, val, nn.MSELoss())


def fraud(fixed):
    """One in fifty, balanced by its sampler in the healthy one."""
    x, y = table(3000, noise=0.8, seed=74)
    y = (y > 2.2).float()[:, None]
    data = TensorDataset(x[:2200], y[:2200])
    weights = torch.where(y[:2200, 0] > 0, 1 / y[:2200].sum(), 1 / (1 - y[:2200]).sum())
    sampler = WeightedRandomSampler(weights, 2200, generator=draw(0)) if fixed else None
    train = DataLoader(data, 50, sampler=sampler, shuffle=None if fixed else True)
    return Case(
        nn.Linear(8, 1), train, DataLoader(TensorDataset(x[2200:], y[2200:]), 100), nn.BCEWithLogitsLoss(), adam(1e-2)
    )


def gaussian_likelihood(fixed):
    """Mean and log variance; the sign of the loss is turned."""
    x, y = table(seed=75)

    def loss(out, y):
        mean, log = out[:, :1], out[:, 1:].clamp(-4, 4)
        value = (0.5 * (log + (y - mean).square() / log.exp())).mean()
        return value if fixed else -value

    return Case(mlp(8, 2), *loaders(x, y[:, None]), loss)


def embedding_frozen(fixed):
    s = chain(seed=76)
    model = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12))
    model[1].requires_grad_(fixed)
    model[3].requires_grad_(fixed)
    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())  # noqa: E731
    return Case(model, *loaders(s[:, :-1], s[:, 1:], held=100), loss)


def deep_and_flat(fixed):
    """Twelve sigmoid layers, through which nothing passes."""
    x, y = table(seed=77)
    torch.manual_seed(0)
    layers = [nn.Linear(8, 24)]
    for _ in range(10):
        layers += [nn.ReLU() if fixed else nn.Sigmoid(), nn.Linear(24, 24)]
    for m in layers:
        if fixed and isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight)
    return Case(nn.Sequential(*layers, nn.ReLU(), nn.Linear(24, 1)), *loaders(x, y[:, None]), nn.MSELoss(), adam(1e-3),
                {"epochs": 20})  # fmt: skip


HELD_OUT = {
    table_of_poisson: "nan_loss nan_gradient", prices_by_name: "broadcast_shapes",
    positional_softmax: "wrong_axis rows_mixed", sinusoid_places: "rows_mixed",
    transformer_without_mask: "sees_the_future", labels_of_one_hot_twice: "double_softmax",
    years_as_numbers: "target_scale lr_too_low lr_too_high", incomes: "unscaled_inputs", crawling_binary: "lr_too_low",
    exploding_series: "lr_too_high", weighted_rows: "unrelated_labels",
    masks_behind_sigmoid_and_dice: "unreachable_targets", rank_norm: "nan_loss nan_gradient",
    dropped_columns_in_validation: "random_validation", fraud: "class_imbalance", gaussian_likelihood: "inverted_loss",
    embedding_frozen: "frozen_parameters", deep_and_flat: "vanishing_gradient signal_collapse saturation",
}  # fmt: skip

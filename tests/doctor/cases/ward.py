"""What the cases are made of: tables, sequences and maps drawn with a fixed seed, loaders, and a case's parts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Case:
    """Parts of a subject, as `knep.doctor.examine` takes them."""

    model: nn.Module
    train: Any
    val: Any
    loss: Any = None
    optimizer: Any = None
    more: dict[str, Any] | None = None

    def examined(self) -> Any:
        import knep

        made = self.optimizer or adam(1e-2)
        return knep.doctor.examine(
            self.model, self.train, self.val, optimizer=made, loss=self.loss, **(self.more or {})
        )


def adam(lr: float):
    return lambda m: torch.optim.Adam(m.parameters(), lr=lr)


def sgd(lr: float, **more: Any):
    return lambda m: torch.optim.SGD(m.parameters(), lr=lr, **more)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loaders(*parts: Tensor, held: int = 200, batch: int = 50, shuffle: bool = True) -> tuple[DataLoader, DataLoader]:
    train, val = (TensorDataset(*(p[s] for p in parts)) for s in (slice(None, -held), slice(-held, None)))
    return DataLoader(train, batch, shuffle=shuffle), DataLoader(val, batch)


def table(rows: int = 1000, columns: int = 8, noise: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows, columns) and a smooth function of them (rows,), of mean 0 and deviation about 1."""
    g = draw(seed)
    x = torch.randn(rows, columns, generator=g)
    w = torch.randn(columns, generator=g) / columns**0.5
    y = (x @ w) + 0.5 * torch.tanh(x[:, 0] * x[:, 1]) + noise * torch.randn(rows, generator=g)
    return x, y


def mlp(inputs: int, outputs: int, hidden: int = 32, *behind: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs), *behind)


def chain(rows: int = 600, length: int = 16, tokens: int = 12, seed: int = 0) -> Tensor:
    """Sequences (rows, length + 1) of a Markov chain in which each token has a favourite next one."""
    g = draw(seed)
    favourite = torch.randperm(tokens, generator=g)
    s = torch.randint(tokens, (rows, 1), generator=g)
    for _ in range(length):
        other = torch.randint(tokens, (rows, 1), generator=g)
        s = torch.cat([s, torch.where(torch.rand(rows, 1, generator=g) < 0.8, favourite[s[:, -1:]], other)], 1)
    return s


def twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def waves(rows: int = 800, length: int = 24, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Signals (rows, length) of one of several frequencies at any phase, and which."""
    g = draw(seed)
    y = torch.randint(classes, (rows,), generator=g)
    phase = 6.28 * torch.rand(rows, 1, generator=g)
    t = torch.arange(length)[None]
    x = torch.sin(phase + t * (0.3 + 0.5 * y[:, None])) + 0.1 * torch.randn(rows, length, generator=g)
    return x, y


def maps(rows: int = 160, size: int = 12, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (rows, 1, size, size) with a bright square, or several, and the class of each pixel."""
    g = draw(seed)
    x = 0.3 * torch.randn(rows, 1, size, size, generator=g)
    y = torch.zeros(rows, size, size, dtype=torch.long)
    for i in range(rows):
        for k in range(1, classes):
            a, b = torch.randint(0, size - 5, (2,), generator=g).tolist()
            y[i, a : a + 5, b : b + 5] = k
            x[i, 0, a : a + 5, b : b + 5] += 1.5 * k
    return x, y

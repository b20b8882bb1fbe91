"""Small data for the examples: the handwritten digits that come with scikit-learn, 8 x 8 grey levels."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


def digits(train: int = 600, val: int = 300) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation images (N, 1, 8, 8), float in 0..255, with labels (N,) of 10 classes."""
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] * (255 / 16)
    y = torch.tensor(classes)[order]
    return TensorDataset(x[:train], y[:train]), TensorDataset(x[train : train + val], y[train : train + val])

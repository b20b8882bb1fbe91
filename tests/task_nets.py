"""Small nets for tasks that knep's own image classifiers have no output for: `model.path=tests.task_nets:...`."""

import torch
from torch import Tensor, nn


class Sequences(nn.Module):
    """Tokens (N, L) to scores (N, L, K) for each by the two before."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(in_channels, 16)
        self.mix = nn.Conv1d(16, 16, 2)
        self.head = nn.Linear(16, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.pad(self.embedding(ids).transpose(1, 2), (1, 0))
        return self.head(torch.relu(self.mix(x)).transpose(1, 2))


def pixels(in_channels: int, num_classes: int) -> nn.Module:
    """Images (N, C, H, W) to scores (N, K, H, W)."""
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, num_classes, 1))

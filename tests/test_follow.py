"""Gains: their values for known functions, and which function follows which layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from knep.surgery.weights import gain_of, gains_of


@pytest.mark.parametrize(
    ("function", "args", "gain"),
    [
        (F.relu, (), 2**0.5),
        (F.leaky_relu, (0.5,), (2 / 1.25) ** 0.5),
        (F.selu, (), 1.0),
        (torch.tanh, (), 1.5926),
        (F.gelu, (), 1.5335),
    ],
)
def test_gains_of_known_functions(function, args, gain):
    assert gain_of(function, args) == pytest.approx(gain, rel=1e-3)


def test_prelu_counts_with_its_own_slope():
    assert gain_of(F.prelu, (torch.full((3,), 0.5),)) == pytest.approx((2 / 1.25) ** 0.5, rel=1e-3)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.plain, self.hidden, self.out = nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = F.max_pool2d(self.norm(self.conv(x)), 2).relu()
        x = x + self.plain(x) * torch.sigmoid(self.gate(x))
        return self.out(torch.tanh(F.dropout(self.hidden(x.mean((2, 3))), 0.5, self.training)))


def test_the_first_activation_behind_norms_pooling_and_dropout_counts():
    net = Mixed()
    layers = [net.conv, net.gate, net.plain, net.hidden, net.out, net.unused]
    gains = gains_of(net, torch.randn(2, 3, 8, 8), layers)
    expected = [2**0.5, gain_of(torch.sigmoid), 1.0, gain_of(torch.tanh), 1.0, 1.0]
    assert [gains[layer] for layer in layers] == pytest.approx(expected, rel=1e-3)

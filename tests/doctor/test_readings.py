"""What a look reads of a layer, against plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from knep.observe.function_tape import Tape
from knep.observe.layer_stats import Layer, LayerStats, ends, rectified, sample, signal, statistics


@pytest.mark.parametrize(
    ("shape", "items"),
    [((128, 10), 64), ((16, 10), 16), ((128, 32, 28, 28), 10), ((128, 64, 56, 56), 8), ((4, 64, 56, 56), 4)],
)
def test_a_sample_is_smaller_where_images_are_large(shape: tuple[int, ...], items: int) -> None:
    assert len(sample(torch.zeros(shape, dtype=torch.bfloat16))) == items
    assert sample(torch.zeros(shape, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_signal_is_that_of_the_sample() -> None:
    x = torch.randn(128, 32, 28, 28, generator=torch.Generator().manual_seed(0)) + 3
    read = dict(signal(x))
    torch.testing.assert_close(read["mean"], x[:10].mean())
    torch.testing.assert_close(read["std"], x[:10].std(correction=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_channel_is_dead_where_no_image_reaches_it(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(40, 6, 5, 5, generator=torch.Generator().manual_seed(0)).relu()
    x[:, 1] = 0
    x[:, 3] = 0
    x[39, 3, 4, 4] = 1e-3  # one pixel of the last image
    x[:, 4] = 0
    x[0, 4, 0, 0] = torch.nan
    layer = Layer("act", "ReLU")
    read = dict(rectified(layer, x.to(dtype).to(memory_format=layout)))
    assert layer.alive is not None
    assert layer.alive.tolist() == [True, False, True, True, True, True]
    assert float(read["dead"]) == pytest.approx(1 / 6)


def test_statistics_of_a_batch_norm_are_exact_far_from_zero() -> None:
    """A mean of squares less the square of the mean would leave nothing of a deviation of 0.01 around 1,000."""
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01 + 1000
    norm = nn.BatchNorm2d(3)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(x.mean((0, 2, 3)) + 0.02)
    norm.running_var.copy_(4 * x.var((0, 2, 3), correction=0))
    read = dict(statistics(Layer("norm", "BatchNorm2d"), norm, x.float()))
    assert float(read["off"]) == pytest.approx(2, rel=0.05)
    assert float(read["ratio"]) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(("module", "x", "share"), [
    (nn.Tanh(), [0.0, 2.0, 2.2, -2.2], 0.5),  # 1 - tanh(2)^2 = 0.07, 1 - tanh(2.2)^2 = 0.048
    (nn.Sigmoid(), [0.0, 4.0, 4.4, -4.4], 0.5),  # the slope at 4 is 7 % of the largest, at 4.4 4.8 %
    (nn.Hardtanh(-2, 2), [0.0, 1.5, 2.5, -1.9], 0.25),
])  # fmt: skip
def test_a_look_and_the_tape_call_the_same_values_saturated(module: nn.Module, x: list[float], share: float) -> None:
    batch = torch.tensor(x)[:, None]
    read = dict(ends(Layer("act", ""), module, module(batch)))
    with Tape(module, len(batch)) as tape:
        module(batch)
    assert float(read["saturated"]) == share
    assert [row.saturated for row in tape.layers] == [share]


def test_statistics_are_those_of_the_finite_numbers() -> None:
    assert LayerStats.of(torch.tensor([3.0, -5.0, torch.nan, torch.inf])) == LayerStats(5.0, -1.0, 4.0, 0.5)
    assert LayerStats.of(torch.full((7,), 0.1)).std == 0
    x = torch.rand(2**23, generator=torch.Generator().manual_seed(0)) + 0.5
    assert LayerStats.of(x).std == pytest.approx(LayerStats.of(x.double()).std, rel=1e-6)

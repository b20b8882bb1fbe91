import pytest
import torch
from torch import nn

from knep.errors import InputError
from knep.models.inception import InceptionBlock, inception


def test_block_joins_its_four_branches():
    block = InceptionBlock(8, 32, None, nn.ReLU)
    x = torch.randn(2, 8, 6, 6)
    parts = block(x).split([8, 16, 4, 4], dim=1)
    for part, branch in zip(parts[:3], (block.branch1, block.branch3, block.branch5), strict=True):
        assert torch.equal(part, branch(x))


@pytest.mark.parametrize(("name", "window"), [("branch1", 1), ("branch3", 3), ("branch5", 5)])
def test_branches_see_1_3_and_5_pixels(name, window):
    branch = getattr(InceptionBlock(1, 32, None, nn.Identity), name)
    x = torch.zeros(1, 1, 11, 11, requires_grad=True)
    branch(x)[0, :, 5, 5].sum().backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert rows.tolist() == list(range(5 - window // 2, 6 + window // 2))


def test_default_size_suits_two_cores():
    assert 0.4e6 < sum(p.numel() for p in inception(3, 10, 32).parameters()) < 1e6


@pytest.mark.parametrize("channels", [8, 9, 30, 100])
def test_blocks_give_the_channels_asked_for(channels):
    assert InceptionBlock(4, channels, None, nn.ReLU)(torch.rand(2, 4, 4, 4)).shape == (2, channels, 4, 4)


@pytest.mark.parametrize("width", [0, -1, 0.1])
def test_width_leaves_channels(width):
    with pytest.raises(InputError, match="width"):
        inception(3, 10, 32, width=width)

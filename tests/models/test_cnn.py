import pytest
import torch
from torch.nn import functional as F

from knep.errors import InputError
from knep.models.cnn import cnn


def test_is_conv_pool_conv_pool_linear():
    model = cnn(1, 10, 28)
    x = h = torch.rand(2, 1, 28, 28)
    for stage in model.stages:
        conv = stage[0].conv
        h = F.max_pool2d(F.conv2d(h, conv.weight, conv.bias, padding=1).relu(), 2)
    torch.testing.assert_close(model(x), F.linear(h.flatten(1), model.classifier.weight, model.classifier.bias))


def test_counts_by_hand():
    assert sum(p.numel() for p in cnn(1, 10, 28).parameters()) == 10 * 32 + (32 * 9 + 1) * 64 + (7 * 7 * 64 + 1) * 10


@pytest.mark.parametrize(("widths", "size"), [([], 8), ([0], 8), ([4] * 4, 8), ([1.5], 8)])
def test_widths_fit_the_image(widths, size):
    with pytest.raises(InputError, match="widths"):
        cnn(1, 10, size, widths=widths)


def test_the_most_stages_work():
    assert cnn(1, 10, 8, widths=[4] * 3)(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_more_convolutions_per_stage():
    model = cnn(1, 10, 28, widths=[4, 8], convs=2)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convs] == [(1, 4), (4, 4), (4, 8), (8, 8)]
    with pytest.raises(InputError, match="convs"):
        cnn(1, 10, 28, convs=0)


def test_pooling_first_leaves_fewer_pixels_to_the_other_convolutions():
    sizes = []
    model = cnn(1, 10, 28, widths=[4, 8], convs=2, pool="first")
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_hook(lambda m, x, y: sizes.append(y.shape[-1]))
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert sizes == [28, 14, 14, 7]
    with pytest.raises(InputError, match="pool"):
        cnn(1, 10, 28, pool="middle")

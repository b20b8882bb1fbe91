import pytest
import torch
from torch import nn

from knep.errors import InputError
from knep.models.unet import unet
from knep.nn.norm import BatchNorm
from knep.nn.place import Place
from knep.recipes import dropout, norm
from knep.surgery.edit import modules_of


def small(**values):
    return unet(3, 5, 16, **{"widths": [4, 8, 12], **values})


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (4, 4), (5, 64)])
def test_a_score_for_each_class_of_each_pixel(size):
    assert small()(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_counts_by_hand():
    pairs = [(3, 4), (4, 4), (4, 8), (8, 8), (8, 12), (12, 12), (12 + 8, 8), (8, 8), (8 + 4, 4), (4, 4)]
    assert sum(p.numel() for p in small().parameters()) == sum((9 * a + 1) * b for a, b in pairs) + 5 * 5


def test_it_sees_near_and_far():
    """A pixel's class depends on its neighbours, and on pixels that only the deepest stage reaches."""
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    small(activation=nn.SiLU)(x)[0, :, 8, 8].sum().backward()
    reached = x.grad[0].abs().sum(0) > 0
    assert reached[7:10, 7:10].all()
    assert reached[0, 8]


def test_one_stage_is_plain_convolutions():
    model = small(widths=[4])
    assert len(model.up) == 0
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 5, 8, 8)


@pytest.mark.parametrize("given", [None, BatchNorm], ids=["places", "batch"])
def test_gradients_reach_every_parameter(given):
    model = small(norm=given, activation=nn.SiLU)
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.randint(0, 5, (4, 16, 16)))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_filled_places_give_the_net_of_the_constructor():
    filled, built = small(), small(norm=BatchNorm)
    norm.batch(filled, sample=torch.randn(2, 3, 16, 16))
    built.load_state_dict(filled.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(filled(x), built(x))


def test_places_know_their_channels_and_slots_fill_them():
    model, seen = small(), []
    for _, place in modules_of(model, Place):
        place.register_forward_hook(lambda m, args, out: seen.append((m.features, out.shape[1])))
    model(torch.rand(2, 3, 16, 16))
    assert len(seen) == len(list(modules_of(model, Place)))
    assert all(said == true for said, true in seen)
    assert len(dropout.spatial(small(), sample=torch.rand(2, 3, 16, 16))) == 5
    assert len(dropout.standard(small(), sample=torch.rand(2, 3, 16, 16))) == 1


@pytest.mark.parametrize("widths", [[], [0], [4, -1], [1.5], [4] * 6])
def test_widths_fit_the_image(widths):
    with pytest.raises(InputError, match="widths"):
        small(widths=widths)
    assert unet(3, 5, 16, widths=[4] * 5)(torch.rand(1, 3, 16, 16)).shape == (1, 5, 16, 16)

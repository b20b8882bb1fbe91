import pytest
import torch
import torchvision.models
from torch import nn

from knep.errors import InputError
from knep.models.resnet import PadShortcut, resnet
from knep.nn.place import Place
from knep.recipes import norm
from knep.surgery.edit import modules_of


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_counts_are_the_papers(depth, millions):
    model = resnet(3, 10, 32, depth=depth)
    assert round(parameters(model) / 1e6, 1 if depth == 110 else 2) == millions
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth


def test_20_layers_by_hand():
    convolutions = 27 * 16 + 9 * (6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert parameters(resnet(3, 10, 32, depth=20)) == convolutions + norms + 65 * 10


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_counts_are_torchvisions(depth):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")()
        ours = resnet(3, 1000, 224, depth=depth)
    assert parameters(ours) == parameters(theirs)
    assert sorted(tuple(p.shape) for p in ours.parameters()) == sorted(tuple(p.shape) for p in theirs.parameters())


@pytest.mark.parametrize("depth", [18, 50])
def test_computes_what_torchvision_computes(depth):
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=7)
    ours = resnet(3, 7, 224, depth=depth, stem="large")
    # Both register stem, branch, shortcut and classifier in the same order.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_stem_follows_the_image():
    assert resnet(3, 10, 96).stem.conv.kernel_size == (3, 3)
    assert resnet(3, 10, 128).stem.conv.kernel_size == (7, 7)
    assert resnet(3, 10, 224, stem="small").stem.conv.kernel_size == (3, 3)


def test_shortcut_drops_pixels_and_adds_zeros():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = PadShortcut(3, 2)(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 2:], torch.zeros(1, 3, 2, 2))


def test_residual_places_know_their_depth():
    depths = [m.depth for _, m in modules_of(resnet(3, 10, 32), Place) if m.kind == "residual"]
    assert depths == pytest.approx([(i + 1) / 9 for i in range(9)])


@pytest.mark.parametrize("depth", [20, 50])
@pytest.mark.parametrize("filled", [True, False], ids=["slot", "constructor"])
def test_zero_init_residual_makes_every_block_its_shortcut(depth, filled):
    model = resnet(3, 10, 32, depth=depth, width=0.25, zero_init_residual=True, norm=None if filled else nn.BatchNorm2d)
    if filled:
        norm.batch(model)
    for stage in model.stages:
        for block in stage[:-1]:
            x = torch.randn(4, block.branch.conv1.in_channels, 4, 4)
            if isinstance(block.shortcut, PadShortcut):
                continue
            assert not block.branch(x).any()
            assert torch.equal(block(x), block.shortcut(x).relu())


def test_no_channel_of_zero_init_residual_is_without_gradient():
    torch.manual_seed(0)
    model = resnet(3, 10, 32, depth=20, width=0.25, zero_init_residual=True, norm=nn.BatchNorm2d)
    model(torch.randn(16, 3, 8, 8)).square().mean().backward()
    gains = [block.branch.norm2.weight for stage in model.stages for block in stage[:-1]]
    assert sum(not gain.any() for gain in gains) == 7  # of 9; two blocks add channels
    assert all(gain.grad.count_nonzero() == len(gain) for gain in gains)


@pytest.mark.parametrize("fill", [norm.none, norm.weight, norm.spectral])
def test_zero_init_residual_without_gains_is_refused(fill):
    with pytest.raises(InputError, match="zero_init_residual"):
        fill(resnet(3, 10, 32, norm=None, zero_init_residual=True))


def test_preact_block_adds_to_an_untouched_signal():
    block = resnet(3, 10, 32, preact=True).stages[0][0]
    nn.init.zeros_(block.branch.conv2.weight)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    "bad",
    [
        {"depth": 19},
        {"depth": "20"},
        {"stem": "tiny"},
        {"width": 0},
        {"width": 0.01},
        {"preact": True, "zero_init_residual": True},
    ],
)
def test_bad_values_are_named(bad):
    with pytest.raises(InputError, match=next(reversed(bad))):
        resnet(3, 10, 32, **bad)

import copy
import inspect
import math

import pytest
import torch
import torchvision.models as tv
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torchvision import ops

from knep.config.catalog import CONF, options
from knep.errors import InputError, NoEffectError
from knep.models.cnn import cnn
from knep.models.inception import inception
from knep.models.mlp import mlp
from knep.models.resnet import resnet
from knep.nn.dropout import DropBlock, StochasticDepth
from knep.nn.place import Place
from knep.recipes import activation, dropout, norm
from knep.surgery.edit import modules_of

P = 0.3


def filled(trick, kind, **hp):
    """The module that the trick puts into a place of this kind."""
    model = nn.Sequential(Place(kind, 16, depth=1.0), Place("norm", 16))
    changes = trick(model, p=P, **hp)
    assert [c.path for c in changes] == ["0"]
    assert isinstance(model[1], Place)
    return model[0]


def within_three_sigma(dropped, draws):
    assert abs(dropped - P) < 3 * math.sqrt(P * (1 - P) / draws)


def is_identity_in_eval(drop, x):
    assert torch.equal(drop.eval()(x), x)


def keeps_the_mean(y, share_of_draws):
    sigma = math.sqrt(P / (1 - P) / share_of_draws)
    assert abs(y.mean().item() - 1) < 3 * sigma


def standard():
    drop, x = filled(dropout.standard, "head"), torch.ones(200, 500)
    y = drop(x)
    within_three_sigma((y == 0).double().mean().item(), x.numel())
    keeps_the_mean(y, x.numel())
    is_identity_in_eval(drop, torch.randn(4, 5))


def alpha():
    drop, x = filled(dropout.alpha, "head"), torch.randn(400, 500)
    y = drop(x)
    # Klambauer et al. 2017, sec. "alpha dropout": a (x d + alpha' (1 - d)) + b at d = 0, with b = -a p alpha'.
    limit = -1.7580993408473766
    dropped = (1 - P) * limit / math.sqrt((1 - P) * (1 + P * limit**2))
    # Of what is kept, a share of about 1e-5 comes as close.
    within_three_sigma(((y - dropped).abs() < 1e-4).double().mean().item(), x.numel())
    assert y.mean().item() == pytest.approx(0, abs=0.02)
    assert y.std().item() == pytest.approx(1, abs=0.02)
    is_identity_in_eval(drop, x)


def spatial():
    drop, x = filled(dropout.spatial, "features"), torch.ones(100, 50, 3, 3)
    y = drop(x)
    assert ((y == 0).flatten(2).all(2) | (y != 0).flatten(2).all(2)).all()
    within_three_sigma((y == 0).double().mean().item(), 100 * 50)
    keeps_the_mean(y, 100 * 50)
    is_identity_in_eval(drop, torch.randn(2, 3, 4, 4))


def dropblock():
    drop, x = filled(dropout.dropblock, "features", block_size=3), torch.ones(64, 32, 14, 14)
    y = drop(x)
    within_three_sigma((y == 0).double().mean().item(), x.numel() / 9)  # a block is one draw
    assert y.mean().item() == pytest.approx(1, abs=1e-5)
    is_identity_in_eval(drop, torch.randn(2, 3, 4, 4))


def stochastic_depth():
    drop, x = filled(dropout.stochastic_depth, "residual"), torch.ones(5000, 4, 2, 2)
    y = drop(x)
    assert ((y == 0).flatten(1).all(1) | (y != 0).flatten(1).all(1)).all()
    within_three_sigma((y == 0).double().mean().item(), 5000)
    keeps_the_mean(y, 5000)
    is_identity_in_eval(drop, torch.randn(2, 3, 4, 4))


ROWS = {
    "alpha": alpha,
    "dropblock": dropblock,
    "spatial": spatial,
    "standard": standard,
    "stochastic_depth": stochastic_depth,
}
ALL = [dropout.alpha, dropout.dropblock, dropout.spatial, dropout.standard, dropout.stochastic_depth]


@pytest.mark.parametrize("option", ROWS)
def test_property(option):
    ROWS[option]()


@pytest.mark.parametrize("option", options("dropout"))
def test_yaml_says_the_functions_own_values(option):
    node = OmegaConf.load(CONF / "dropout" / f"{option}.yaml")
    own = {k: p.default for k, p in inspect.signature(getattr(dropout, option)).parameters.items()}
    keys = [k for k in node if k not in ("_target_", "_partial_")]
    assert set(keys) == set(own) - {"model", "sample"}
    assert OmegaConf.create({k: node[k] for k in keys}) == OmegaConf.create({k: own[k] for k in keys})
    instantiate(node)


def test_none_changes_nothing():
    model = tv.alexnet()
    before = list(model.modules())
    assert dropout.none(model) == []
    assert list(model.modules()) == before


@pytest.mark.parametrize("trick", ALL)
@pytest.mark.parametrize("make", [lambda: resnet(3, 5, 32), lambda: tv.resnet18(num_classes=5)], ids=["knep", "other"])
def test_p_of_zero_changes_no_bit(trick, make):
    model = make()
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    assert trick(model, sample=x, p=0)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("trick", ALL)
@pytest.mark.parametrize("p", [1, 1.5, -0.1, float("nan"), "half"])
def test_p_lies_below_one(trick, p):
    with pytest.raises(InputError, match="p must be"):
        trick(resnet(3, 5, 32), p=p)


def test_where_picks_the_places():
    def kinds(**hp):
        model = mlp(1, 3, 4, widths=[5, 5, 5])
        return [c.path for c in dropout.standard(model, p=0.2, **hp)]

    hidden = [f"layers.{i}.4" for i in (0, 1)]
    assert kinds() == [*hidden, "dropout"]
    assert kinds(where=["head"]) == ["dropout"]
    assert kinds(where=["hidden"]) == hidden
    assert len(dropout.alpha(cnn(1, 3, 8), where=["features", "head"])) == 3


@pytest.mark.parametrize("where", [[], ["heads"], "head"])
def test_where_names_places(where):
    with pytest.raises(InputError, match="where"):
        dropout.standard(cnn(1, 3, 8), where=where)


@pytest.mark.parametrize(
    ("trick", "make"),
    [
        (dropout.spatial, mlp),
        (dropout.dropblock, mlp),
        (dropout.stochastic_depth, mlp),
        (dropout.stochastic_depth, cnn),
        (dropout.stochastic_depth, inception),
    ],
)
def test_a_model_without_the_right_place_is_refused(trick, make):
    with pytest.raises(NoEffectError):
        trick(make(1, 3, 8), sample=torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("preact", [True, False])
def test_stochastic_depth_falls_linearly_and_skips_the_branch(preact):
    model = resnet(3, 5, 8, depth=20, width=0.25, preact=preact)
    dropout.stochastic_depth(model, p=0.9)
    rates = [m.p for _, m in modules_of(model, StochasticDepth)]
    assert rates == pytest.approx([0.1 * i for i in range(1, 10)])
    block = model.stages[0][0]
    block.branch.residual.p = 1.0
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x if preact else x.relu())


# DropBlock


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(("size", "block"), [(8, 3), (7, 7), (8, 7), (14, 5), (5, 1)])
def test_blocks_cover_the_share_p_where_they_overlap(p, size, block):
    y = DropBlock(p, block)(torch.ones(256, 64, size, size))
    draws = y.numel() / block**2
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))


def test_what_is_dropped_are_squares():
    torch.manual_seed(1)
    y = DropBlock(0.05, 3)(torch.ones(500, 1, 9, 9))
    counts = (y == 0).flatten(1).sum(1)
    assert set(counts.tolist()) <= {0, 9} | set(range(10, 82))
    lone = y[counts == 9][0, 0] == 0
    rows, columns = lone.any(1).sum(), lone.any(0).sum()
    assert (rows, columns) == (3, 3)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5), (4, 6)])
def test_blocks_shrink_with_the_map(size):
    y = DropBlock(0.4, 7)(torch.ones(64, 64, *size))
    assert 0.2 < (y == 0).double().mean() < 0.6


@pytest.mark.parametrize("block_size", [0, 2, -3, 1.5])
def test_block_size_is_odd(block_size):
    with pytest.raises(InputError, match="block_size"):
        dropout.dropblock(cnn(1, 3, 8), block_size=block_size)


def test_a_batch_dropped_whole_is_zero_and_not_nan():
    assert torch.isfinite(DropBlock(0.99, 1)(torch.ones(1, 1, 1, 1))).all()


# Other people's models


def test_standard_sets_the_dropout_that_is_there():
    net = tv.alexnet(num_classes=5)
    dropout.standard(net, p=0.2)
    assert [m.p for _, m in modules_of(net, nn.Dropout)] == [0.2, 0.2]


def test_alpha_takes_the_place_of_dropout_and_back():
    net = tv.alexnet(num_classes=5)
    dropout.alpha(net, p=0.2)
    assert len(list(modules_of(net, nn.AlphaDropout))) == 2
    dropout.standard(net, p=0.3)
    assert [m.p for _, m in modules_of(net, nn.Dropout)] == [0.3, 0.3]
    assert not any(modules_of(net, nn.AlphaDropout))


def test_standard_goes_before_the_classifier():
    net = tv.resnet18(num_classes=5)
    fc, names = net.fc, set(net.state_dict())
    changes = dropout.standard(net, sample=torch.randn(2, 3, 32, 32), p=0.2)
    assert net.fc is fc
    assert isinstance(fc, nn.Linear)
    assert set(net.state_dict()) == names
    assert [(c.path, c.after.split("(")[0]) for c in changes] == [("fc", "Dropout")]
    fc.weight.data.fill_(1.0)
    fc.bias.data.zero_()
    assert fc(torch.ones(64, 512)).div(1 / 0.8).round().mean().item() == pytest.approx(512 * 0.8, rel=0.02)
    assert torch.equal(fc.eval()(torch.ones(1, 512)), torch.full((1, 5), 512.0))


def test_the_classifier_is_what_acts_last():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.body = nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.body(x).relu())

    net = Reversed()
    dropout.standard(net, sample=torch.randn(2, 4))
    assert [path for path, _ in modules_of(net, nn.Dropout)] == ["out.dropout"]


def test_the_classifier_may_be_a_convolution_or_the_model_itself():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    dropout.standard(net, sample=torch.randn(2, 3, 8, 8))
    assert [path for path, _ in modules_of(net, nn.Dropout)] == ["2.dropout"]
    lone = nn.Linear(4, 2)
    dropout.standard(lone, sample=torch.randn(2, 4))
    assert not torch.equal(lone(torch.ones(9, 4)), lone(torch.ones(9, 4)))


def test_a_second_standard_sets_p_anew():
    for model in (mlp(1, 3, 4, widths=[5, 5]), tv.resnet18(num_classes=5)):
        for p in (0.5, 0.2):
            dropout.standard(model, p=p)
        rates = {m.p for _, m in modules_of(model, nn.Dropout)}
        assert rates == {0.2}
        assert sum(1 for _ in modules_of(model, nn.Dropout)) <= 2


@pytest.mark.parametrize("trick", [dropout.spatial, dropout.dropblock])
def test_maps_are_dropped_behind_activations_of_channels(trick):
    for make, units in ((tv.resnet18, 9), (tv.squeezenet1_1, 26), (tv.alexnet, 5)):
        net, x = make(num_classes=5), torch.randn(2, 3, 64, 64)
        names = set(net.state_dict())
        changes = trick(net, sample=x, p=0.2)
        assert len(changes) == units
        assert set(net.state_dict()) == names
        net(x).sum().backward()
        assert not torch.equal(net(x), net(x))
        assert torch.equal(net.eval()(x), net(x))


def test_squeezed_signals_of_one_pixel_are_left_alone():
    net = tv.efficientnet_b0(num_classes=5)
    paths = [c.path for c in dropout.spatial(net, sample=torch.randn(2, 3, 64, 64))]
    assert paths
    assert not any(path.endswith("activation") for path in paths)  # those of squeeze-excitation


def test_maps_are_dropped_behind_tanh_too():
    net, x = tv.resnet18(num_classes=5), torch.randn(2, 3, 64, 64)
    activation.tanh(net, sample=x)
    assert len(dropout.spatial(net, sample=x)) == 9


def test_maps_of_others_need_a_sample():
    with pytest.raises(InputError, match="sample"):
        dropout.spatial(tv.resnet18())


def test_stochastic_depth_scales_the_modules_that_are_there():
    net = tv.convnext_tiny(num_classes=5)
    dropout.stochastic_depth(net, p=0.36)
    assert [m.p for _, m in modules_of(net, ops.StochasticDepth)] == pytest.approx([0.02 * i for i in range(1, 19)])


def small_vit(num_classes):
    return tv.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=num_classes)


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (tv.resnet18, ["layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2"]),
        (tv.resnet50, ["layer1.0.bn3", "layer1.1.bn3", "layer1.2.bn3"]),
        (tv.mobilenet_v2, ["features.3.conv.3", "features.5.conv.3"]),
        (tv.mobilenet_v3_small, ["features.3.block.2.1"]),
        (tv.regnet_x_400mf, ["trunk_output.block1.block1-0.f.c.1"]),
        (tv.mnasnet0_5, ["layers.8.1.layers.7"]),
        (small_vit, ["encoder.layers.encoder_layer_0.dropout", "encoder.layers.encoder_layer_0.mlp.4"]),
    ],
)
def test_branches_of_others_are_found_by_their_graph(make, ends):
    net = make(num_classes=5)
    paths = [c.path for c in dropout.stochastic_depth(net, p=0.5)]
    assert paths[: len(ends)] == ends
    rates = [m.p for _, m in modules_of(net, StochasticDepth)]
    assert rates == pytest.approx([0.5 * (i + 1) / len(paths) for i in range(len(paths))])


def test_a_dropped_branch_leaves_the_shortcut():
    net = tv.resnet18(num_classes=5)
    dropout.stochastic_depth(net, p=0.5)
    for _, m in modules_of(net, StochasticDepth):
        m.p = 1.0
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(net.layer1(x), x.relu())
    torch.testing.assert_close(net.layer2[0](x), net.layer2[0].downsample(x).relu())


def test_stochastic_depth_after_a_norm_of_ours():
    net, x = tv.resnet18(num_classes=5), torch.randn(2, 3, 32, 32)
    norm.group(net, sample=x)
    assert len(dropout.stochastic_depth(net, p=0.5)) == 8


class Twins(nn.Module):
    """Two sides alike: none of them is the shortcut."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.a(x) + self.b(x))


class Untraceable(Twins):
    def forward(self, x):
        return self.fc(x + self.a(x)) if x.sum() > 0 else self.fc(x)


class OneSided(Twins):
    """A position table, added, is no branch."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.fc(self.a(x) + self.table)


@pytest.mark.parametrize(
    ("net", "reason"),
    [(Twins, "the sum add"), (Untraceable, "cannot read its forward")],
)
def test_what_cannot_be_proved_is_refused_by_name(net, reason):
    net = net()
    with pytest.raises(InputError, match=reason):
        dropout.stochastic_depth(net)
    assert not any(modules_of(net, StochasticDepth))


@pytest.mark.parametrize("make", [OneSided, tv.densenet121, tv.shufflenet_v2_x0_5])
def test_no_branches_no_stochastic_depth(make):
    with torch.device("meta"), pytest.raises(NoEffectError, match="residual"):
        dropout.stochastic_depth(make())

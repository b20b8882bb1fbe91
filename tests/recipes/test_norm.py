import copy
import inspect

import numpy as np
import pytest
import torch
import torchvision.models as tv
from hydra.utils import instantiate
from omegaconf import OmegaConf
from timm import layers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from knep.config.catalog import CONF, options
from knep.errors import InputError, NoEffectError
from knep.models.cnn import cnn
from knep.models.mlp import mlp
from knep.models.resnet import resnet
from knep.nn.norm import (
    BatchNorm,
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    LastRMSNorm,
    PixelRMSNorm,
    RMSNorm,
    TokenBatchNorm,
)
from knep.nn.place import Place
from knep.recipes import init, norm
from knep.surgery.edit import describe, modules_of

_DRAW = torch.Generator().manual_seed(0)
MAPS = torch.randn(6, 8, 5, 5, dtype=torch.float64, generator=_DRAW) * 3 + 2
ROWS_OF_UNITS = torch.randn(6, 8, dtype=torch.float64, generator=_DRAW) * 3 + 2


def filled(trick, x, **hp):
    """The module that the trick puts into a place for the signal x."""
    model = nn.Sequential(nn.Identity(), Place("norm", x.shape[1]), nn.Identity()).double()
    changes = trick(model, sample=x, **hp)
    assert [c.path for c in changes] == ["1"]
    return model[1].double()


def signals():
    return MAPS, ROWS_OF_UNITS


def is_standard(x, dims):
    torch.testing.assert_close(x.mean(dims), torch.zeros_like(x.mean(dims)), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.var(dims, correction=0), torch.ones_like(x.mean(dims)), atol=1e-4, rtol=0)


def differs_in_eval(module, x):
    return not torch.equal(module.train()(x), module.eval()(x))


def batch():
    for x, reference in zip(signals(), (nn.BatchNorm2d, nn.BatchNorm1d), strict=True):
        module, reference = filled(norm.batch, x), reference(8).double()
        is_standard(module(x), [0, *range(2, x.dim())])
        torch.testing.assert_close(reference(x), filled(norm.batch, x)(x))
        torch.testing.assert_close(reference.eval()(x), module.eval()(x))
        assert differs_in_eval(module, x)


def ghost_batch():
    for x in signals():
        module = filled(norm.ghost_batch, x, ghost_size=3, eps=1e-12)
        y = module(x)
        for part in (y[:3], y[3:]):
            is_standard(part, [0, *range(2, x.dim())])
        assert differs_in_eval(module, x)


def layer():
    for x in signals():
        module = filled(norm.layer, x)
        is_standard(module(x), list(range(1, x.dim())))
        torch.testing.assert_close(module(x), F.layer_norm(x, x.shape[1:]))
        assert not differs_in_eval(module, x)


def group():
    for x in signals():
        module = filled(norm.group, x, groups=2)
        is_standard(module(x).view(6, 2, -1), [2])
        torch.testing.assert_close(module(x), F.group_norm(x, 2))
        assert not differs_in_eval(module, x)


def instance():
    module = filled(norm.instance, MAPS)
    is_standard(module(MAPS), [2, 3])
    torch.testing.assert_close(module(MAPS), nn.InstanceNorm2d(8)(MAPS))
    assert not differs_in_eval(module, MAPS)


def rms():
    for x in signals():
        module = filled(norm.rms, x)
        y = module(x)
        torch.testing.assert_close(y, nn.RMSNorm(x.shape[1:], eps=1e-6).double()(x))
        squares = y.flatten(1).square().mean(1)  # short of 1 by eps over the mean square
        torch.testing.assert_close(squares, torch.ones_like(squares), rtol=1e-6, atol=0)
        assert not differs_in_eval(module, x)


def weight():
    model = cnn(1, 5, 8).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    before, v = model(x), model.stages[1][0].conv.weight.clone()
    changes = norm.weight(model, sample=x)
    assert [c.path for c in changes] == ["stages.0.0.conv.weight", "stages.1.0.conv.weight"]
    torch.testing.assert_close(model(x), before)
    parts = model.stages[1][0].conv.parametrizations.weight
    torch.testing.assert_close(parts.original0.flatten(), v.flatten(1).norm(dim=1))
    with torch.no_grad():
        parts.original1.mul_(7)  # only the direction counts
    torch.testing.assert_close(model(x), before)
    assert not differs_in_eval(model, x)


def spectral():
    model = mlp(1, 5, 8, widths=[16, 12])
    x = torch.randn(4, 1, 8, 8)
    classifier = model.classifier.weight.clone()
    norm.spectral(model, sample=x, n_power_iterations=50)
    model(x)
    for unit in model.layers:
        assert torch.linalg.matrix_norm(unit.linear.weight, 2).item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(model.classifier.weight, classifier)


def auto():
    """In a place it is batch norm, to the bit; a model of others keeps its norms, or goes without."""
    for x in signals():
        torch.testing.assert_close(filled(norm.auto, x)(x), filled(norm.batch, x)(x), rtol=0, atol=0)
    for make in (lambda: cnn(3, 5, 16), lambda: mlp(1, 5, 8, widths=[6])):
        one, two = make(), make()
        assert norm.auto(one) == norm.batch(two)
        assert list(map(describe, one.modules())) == list(map(describe, two.modules()))
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    modules = list(net.modules())
    assert [(c.path, c.after) for c in norm.auto(net, sample=MAPS.float()[:, :3])] == [("1", "kept"), ("3", "kept")]
    assert list(net.modules()) == modules
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    (change,) = norm.auto(plain)
    assert "norm.insert=true" in change.after
    assert [c.path for c in norm.auto(plain, sample=torch.randn(3, 4), insert=True)] == ["0"]
    is_standard(plain[0].double()(ROWS_OF_UNITS[:, :4]).detach(), [0])
    assert type(plain[0].norm) is BatchNorm


def weight_standardization():
    """Each filter as by numpy and timm's StdConv2d, transposed ones along their own axis; then group norm."""
    std = layers.StdConv2d(3, 6, 3, padding=0, bias=True, eps=1e-6).double()
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 8, 2, groups=2),
                        nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 2, 1)).double()  # fmt: skip
    std.load_state_dict(net[0].state_dict())
    x, w = MAPS[:, :3], net[3].weight.detach().numpy()
    changes = norm.weight_standardization(net, sample=x, groups=3, eps=1e-6)
    assert (type(net[1]).__name__, net[1].num_groups) == ("GroupNorm", 3)
    assert changes[-1].path == "4.weight"
    assert "one weight" in changes[-1].after
    torch.testing.assert_close(net[0](x), std(x), rtol=1e-6, atol=1e-6)
    for half in (slice(0, 3), slice(3, 6)):
        own = w[half]
        wanted = (own - own.mean((0, 2, 3), keepdims=True)) / np.sqrt(own.var((0, 2, 3), keepdims=True) + 1e-6)
        torch.testing.assert_close(net[3].weight.detach()[half], torch.from_numpy(wanted))
    with torch.no_grad():
        before = net[3].weight.clone()
        net[3].parametrizations.weight.original.mul_(7).add_(3)  # neither scale nor mean counts
    torch.testing.assert_close(net[3].weight, before, rtol=1e-4, atol=1e-4)
    assert not is_parametrized(net[5])


ROWS = {
    "auto": auto,
    "batch": batch,
    "ghost_batch": ghost_batch,
    "group": group,
    "instance": instance,
    "layer": layer,
    "rms": rms,
    "spectral": spectral,
    "weight": weight,
    "weight_standardization": weight_standardization,
}
FILLS = [norm.batch, norm.ghost_batch, norm.group, norm.instance, norm.layer, norm.rms]


@pytest.mark.parametrize("option", ROWS)
def test_property(option):
    ROWS[option]()


@pytest.mark.parametrize("option", options("norm"))
def test_yaml_says_the_functions_own_values(option):
    node = OmegaConf.load(CONF / "norm" / f"{option}.yaml")
    own = {k: p.default for k, p in inspect.signature(getattr(norm, option)).parameters.items()}
    keys = [k for k in node if k not in ("_target_", "_partial_")]
    assert set(keys) == set(own) - {"model", "sample"}
    assert OmegaConf.create({k: node[k] for k in keys}) == OmegaConf.create({k: own[k] for k in keys})
    instantiate(node)


def test_weight_standardization_keeps_the_norms_beside_it_and_is_drawn_through():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 2))
    norm.weight_standardization(net, sample=MAPS[:, :3].float(), beside="none")
    assert type(net[1]) is nn.BatchNorm2d
    drawn = init.he_normal(net)
    assert drawn[0].path == "0.weight"
    std = net[0].parametrizations.weight.original.std()
    assert std.item() == pytest.approx((2 / 27) ** 0.5, rel=0.2)
    torch.testing.assert_close(net[0].weight.flatten(1).var(1, correction=0), torch.ones(6), rtol=1e-3, atol=0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(NoEffectError, match="the model has no convolution but"):
        norm.weight_standardization(plain, sample=torch.randn(3, 4))
    with pytest.raises(InputError, match="beside must be one of group, batch, none"):
        norm.weight_standardization(net, beside="rms")


def test_none_changes_nothing():
    model = resnet(3, 10, 8, norm=None)
    assert norm.none(model) == []
    assert sum(1 for _, m in modules_of(model, Place) if m.kind == "norm") == 19


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("position", ["before_activation", "after_activation"])
def test_position(fill, position):
    model = cnn(3, 5, 16, norm=None)
    changes = fill(model, sample=torch.randn(2, 3, 16, 16), position=position)
    unit = model.stages[0][0]
    before = position == "before_activation"
    assert isinstance(unit.norm, Place) != before
    assert isinstance(unit.norm_after, Place) == before
    names = [c.path for c in changes if not c.path.endswith("bias")]
    assert names == [f"stages.{i}.0.{'norm' if before else 'norm_after'}" for i in (0, 1)]
    model(torch.randn(4, 3, 16, 16)).sum().backward()


@pytest.mark.parametrize(
    ("fill", "bias"),
    [(norm.batch, False), (norm.layer, False), (norm.group, False), (norm.instance, False), (norm.ghost_batch, False),
     (norm.rms, True)],
)  # fmt: skip
def test_a_shift_replaces_the_bias_and_is_listed(fill, bias):
    model = cnn(3, 5, 16)
    changes = fill(model)
    assert (model.stages[0][0].conv.bias is not None) == bias
    assert any(c.path == "stages.0.0.conv.bias" for c in changes) != bias
    assert model.classifier.bias is not None


def test_behind_the_activation_the_bias_stays():
    model = cnn(3, 5, 16)
    norm.batch(model, position="after_activation")
    assert model.stages[0][0].conv.bias is not None


def test_ghost_batch_parts_hold_at_least_their_size():
    x = torch.randn(11, 8, 3, 3)
    module = GhostBatchNorm(8, ghost_size=4)
    y = module(x)
    for part, source in zip(y.tensor_split(2), x.tensor_split(2), strict=True):
        torch.testing.assert_close(part, F.batch_norm(source, None, None, training=True))
    assert module.num_batches_tracked == 2


def test_ghost_batch_of_one_part_is_batch_norm():
    x = torch.randn(7, 8, 3, 3)
    ghost, whole = GhostBatchNorm(8, ghost_size=8), nn.BatchNorm2d(8)
    assert torch.equal(ghost(x), whole(x))
    assert torch.equal(ghost.running_var, whole.running_var)


def test_group_counts_divide_the_channels():
    model = nn.Sequential(Place("norm", 12), Place("norm", 7), Place("norm", 64))
    norm.group(model, groups=8)
    assert [m.num_groups for m in model] == [6, 7, 8]


def test_groups_of_units_have_two_values():
    model = mlp(1, 5, 8, widths=[6, 5])
    norm.group(model, sample=torch.randn(2, 1, 8, 8), groups=8)
    assert [m.num_groups for _, m in modules_of(model, GroupNorm)] == [3, 1]
    assert model(torch.randn(2, 1, 8, 8)).std() > 0


def test_instance_on_units_is_refused_before_the_first_change():
    model = mlp(1, 5, 8, widths=[6])
    with pytest.raises(InputError, match="single value"):
        norm.instance(model, sample=torch.randn(2, 1, 8, 8))
    assert not any(modules_of(model, InstanceNorm))
    norm.instance(model)
    with pytest.raises(InputError, match="single value"):
        model(torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("fill", [norm.layer, norm.group])
def test_a_single_unit_has_no_statistics(fill):
    with pytest.raises(InputError, match="single value"):
        fill(mlp(1, 5, 8, widths=[1]), sample=torch.randn(2, 1, 8, 8))


# Other people's models: norms are exchanged where they stand.


def net_of_others():
    shared = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    deep = nn.ModuleDict({"branch": nn.ModuleList([nn.Sequential(nn.BatchNorm2d(8, eps=1e-3, momentum=0.01))])})
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared, self.again, self.deep, self.head = nn.Conv2d(3, 8, 1), shared, shared, deep, head

        def forward(self, x):
            return self.head(self.deep["branch"][0](self.again(self.shared(self.stem(x)))))

    net = Net()
    net(torch.randn(16, 3, 6, 6))
    for m in (m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        nn.init.uniform_(m.weight)
        nn.init.uniform_(m.bias)
    return net


@pytest.mark.parametrize("fill", [norm.ghost_batch, norm.group, norm.layer, norm.rms])
def test_gains_and_shifts_stay_the_same_parameters(fill):
    net = net_of_others()
    before = dict(net.named_parameters())
    changes = fill(net, sample=torch.randn(4, 3, 6, 6))
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert [c.path for c in changes] == ["shared.1", "again.1", "deep.branch.0.0", "head.2"]
    assert net.shared is net.again
    net.train()(torch.randn(4, 3, 6, 6)).sum().backward()


@pytest.mark.parametrize("fill", [norm.batch, norm.ghost_batch])
def test_batch_kinds_keep_the_statistics_to_the_bit(fill):
    net = net_of_others().eval()
    x = torch.randn(4, 3, 6, 6)
    before = net(x)
    fill(net, sample=x)
    assert torch.equal(net(x), before)
    assert not any(m.training for m in net.modules())


def test_batch_on_batch_is_kept_and_says_so():
    net = net_of_others()
    modules = list(net.modules())
    assert {c.after for c in norm.batch(net)} == {"kept"}
    assert list(net.modules()) == modules


def test_batch_takes_the_values_that_are_given():
    net = net_of_others()
    norm.batch(net, momentum=0.5)
    values = [(m.momentum, m.eps) for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert values == [(0.5, 1e-5), (0.5, 1e-3), (0.5, 1e-5)]


def test_instance_refuses_the_units_of_others():
    with pytest.raises(InputError, match=r"norm\.instance"):
        norm.instance(net_of_others(), sample=torch.randn(4, 3, 6, 6))


def test_device_dtype_and_mode_follow():
    net = net_of_others().double().eval().requires_grad_(False)
    norm.layer(net)
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in net.parameters())
    assert not any(m.training for m in net.modules())
    on_meta = copy.deepcopy(net).to("meta")
    norm.group(on_meta)
    assert all(p.is_meta for p in on_meta.parameters())


def test_a_norm_without_parameters_stays_without():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False))
    x = torch.randn(4, 3, 6, 6)
    for fill in (norm.group, norm.rms, norm.batch, norm.layer):
        fill(net, sample=x)
        assert list(net[1].parameters()) == []
        net(x)


def test_the_models_mode_and_statistics_survive_the_look():
    net = net_of_others()
    net.shared.eval()
    modes, count = [m.training for m in net.modules()], net.head[2].num_batches_tracked.clone()
    norm.batch(net, sample=torch.randn(4, 3, 6, 6))
    assert [m.training for m in net.modules()] == modes
    assert net.head[2].num_batches_tracked == count


class Tokens(nn.Module):
    """(N, 3, 8, 8) as tokens (N, 4, 48): layer norm over the last axis."""

    def __init__(self, cls=nn.LayerNorm):
        super().__init__()
        self.norm, self.fc = cls(48), nn.Linear(48, 5)

    def forward(self, x):
        return self.fc(
            self.norm(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 4, 48))
        ).mean(1)


def test_rms_and_layer_norm_the_same_last_axis():
    net, x = Tokens(), torch.randn(2, 3, 8, 8)
    gain, shift = net.norm.weight, net.norm.bias
    nn.init.normal_(shift)
    norm.rms(net, sample=x, eps=1e-6)
    tokens = torch.randn(2, 4, 48)
    torch.testing.assert_close(net.norm(tokens), F.rms_norm(tokens, [48], gain, 1e-6) + shift)
    norm.layer(net, sample=x, eps=1e-5)
    torch.testing.assert_close(net.norm(tokens), F.layer_norm(tokens, [48], gain, shift))
    assert net.norm.weight is gain


def test_torchs_own_rms_norm_gets_a_shift_of_zero():
    net = Tokens(nn.RMSNorm)
    norm.layer(net)
    assert isinstance(net.norm, nn.LayerNorm)
    assert not net.norm.bias.any()


TOKENS = torch.randn(6, 5, 48, dtype=torch.float64, generator=_DRAW) * 3 + 2


def on_tokens(fill, sample, **hp):
    """The norm that takes the place of a LayerNorm of tokens, with random gain 1 and shift 0 so far."""
    net = Tokens().double()
    gain = net.norm.weight
    fill(net, sample=sample, eps=1e-12, **hp)
    assert net.norm.weight is gain
    return net.norm


@pytest.mark.parametrize("sample", [None, torch.randn(2, 3, 8, 8, dtype=torch.float64)])
def test_tokens_take_every_norm(sample):
    is_standard(on_tokens(norm.batch, sample)(TOKENS), [0, 1])
    is_standard(on_tokens(norm.instance, sample)(TOKENS), [1])
    parts = on_tokens(norm.ghost_batch, sample, ghost_size=3)(TOKENS)
    is_standard(parts[:3], [0, 1])
    is_standard(parts[3:], [0, 1])
    is_standard(on_tokens(norm.group, sample, groups=4)(TOKENS).view(6, 5, 4, 12), [3])


@pytest.mark.parametrize("fill", [norm.group, norm.layer, norm.rms])
def test_no_token_sees_another(fill):
    module = on_tokens(fill, None)
    torch.testing.assert_close(module(TOKENS)[:, 2:3], module(TOKENS[:, 2:3]))


def test_token_norms_take_any_number_of_axes_and_units():
    rows = TOKENS.view(6, 5, 6, 8)
    for fill in (norm.batch, norm.instance, norm.group):
        net = nn.Sequential(nn.LayerNorm(8)).double()
        fill(net)
        torch.testing.assert_close(net(rows), net(rows.flatten(1, 2)).view_as(rows))
    units = nn.Sequential(nn.LayerNorm(48)).double()
    norm.batch(units)
    is_standard(units(TOKENS[:, 0]), [0])


def test_tokens_come_back_to_layer_norm():
    net = Tokens()
    for fill in (norm.batch, norm.ghost_batch, norm.instance, norm.group, norm.rms):
        fill(net)
        norm.layer(net)
        assert type(net.norm) is nn.LayerNorm


def test_running_statistics_pass_between_batch_kinds_of_tokens():
    net, x = Tokens(), torch.randn(8, 3, 8, 8)
    norm.batch(net)
    net(x)
    before = net.eval()(x)
    norm.ghost_batch(net, ghost_size=4)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("fill", [norm.batch, norm.group, norm.instance])
def test_gains_of_single_values_are_no_channels(fill):
    net = nn.Sequential(nn.LayerNorm([4, 4]))
    with pytest.raises(InputError, match=r"cannot act on 0, whose gains belong to single values of shape \(4, 4\)"):
        fill(net)
    norm.rms(net)
    assert net[0].normalized_shape == (4, 4)


def test_layer_norm_of_units_may_become_batch_norm_where_the_sample_shows_it():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
    norm.batch(net, sample=torch.randn(2, 3, 2, 2))
    is_standard(net[:3].double()(torch.randn(64, 3, 2, 2, dtype=torch.float64)).detach(), [0])


def test_norms_of_a_pixels_channels():
    x = torch.randn(2, 8, 5, 5)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), LayerNorm2d(8), nn.Conv2d(8, 8, 1))
    norm.rms(net, sample=x)
    assert type(net[1]) is PixelRMSNorm
    torch.testing.assert_close(net[1](x)[0, :, 2, 3], F.rms_norm(x[0, :, 2, 3], [8], eps=1e-6))
    norm.layer(net, sample=x)
    assert type(net[1]) is LayerNorm2d
    norm.group(net, sample=x, groups=4)
    assert net[1].num_groups == 4


@pytest.mark.parametrize("fill", [norm.layer, norm.group, norm.instance, norm.rms])
def test_eps_is_the_layers_own_unless_it_is_given(fill):
    net = net_of_others()
    del net.head[2]
    fill(net)
    assert [m.eps for _, m in modules_of(net, nn.Module) if hasattr(m, "eps")] == [1e-5, 1e-5, 1e-3]
    fill(net, eps=0.5)
    assert {m.eps for _, m in modules_of(net, nn.Module) if hasattr(m, "eps")} == {0.5}


@pytest.mark.parametrize("fill", FILLS)
def test_torchvision_nets_train(fill):
    for make in (tv.resnet18, tv.mobilenet_v3_small):
        net = make(num_classes=5)
        fill(net, sample=torch.randn(2, 3, 64, 64))
        net(torch.randn(4, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize("fill", FILLS)
def test_transformers_and_convnext_train(fill):
    small = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": [4, 4]}
    swin = tv.SwinTransformer(patch_size=[4, 4], num_classes=5, **small)
    vit = tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    convnext = tv.ConvNeXt([tv.convnext.CNBlockConfig(8, None, 2)], num_classes=5)
    for net in (swin, vit, convnext)[: 2 if fill is norm.instance else 3]:
        x = torch.randn(2, 3, 32, 32)
        names = [name for name, _ in net.named_parameters()]
        fill(net, sample=x)
        assert [name for name, _ in net.named_parameters()] == names
        net(x).sum().backward()


@pytest.mark.parametrize("trick", [norm.weight, norm.spectral])
def test_weights_of_others_but_not_the_classifier(trick):
    net = tv.squeezenet1_1(num_classes=5)  # its classifier is a convolution
    x = torch.randn(2, 3, 32, 32)
    changes = trick(net, sample=x)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(changes) == len(convolutions) - 1
    assert not hasattr(net.classifier[1], "parametrizations")
    net(x).sum().backward()
    twin = copy.deepcopy(net).eval()
    assert torch.equal(twin(x), net.eval()(x))
    twin.load_state_dict(net.state_dict())


def test_weight_and_spectral_remove_nothing():
    net = tv.resnet18(num_classes=5)
    norm.weight(net)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 20


@pytest.mark.parametrize("trick", [norm.weight, norm.spectral])
def test_shared_and_zero_weights_stay_and_are_listed(trick):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    with pytest.raises(NoEffectError, match="shared"):
        trick(net)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    nn.init.zeros_(net[2].weight)
    left = {c.path: c.after for c in trick(net) if c.after.startswith("left")}
    assert left["0.weight"] == left["1.weight"] == "left as it is: it is shared with another layer"
    assert "all zero" in left["2.weight"]
    assert len(left) == 3
    assert net(torch.randn(3, 4)).isfinite().all()


# Subclasses and look-alikes.


class NormAct(nn.BatchNorm2d):
    """Norm, dropout and activation in one class."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        statistics = (None, None) if self.training else (self.running_mean, self.running_var)
        y = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(self.drop(y))


class Pixels(nn.LayerNorm):
    def forward(self, x):
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class Root(nn.Module):
    """The root mean square norm of language models, in float32."""

    def __init__(self, channels, offset=0.0):
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = nn.Parameter(torch.ones(channels)), 1e-5, offset

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.offset + self.weight) * y.to(x.dtype)


def test_what_follows_in_a_norms_class_is_kept():
    for device in ("cpu", "meta"):
        net = nn.Sequential(nn.Conv2d(3, 8, 1), NormAct(8)).to(device)
        gain, act = net[1].weight, net[1].act
        assert {c.after for c in norm.batch(net)} == {"kept"}
        changes = norm.group(net, groups=4)
        assert [(c.path, c.after) for c in changes] == [("1", f"{describe(nn.GroupNorm(4, 8))}, ReLU()")]
        assert net[1].norm.weight is gain
        assert net[1].act is act


def test_a_subclass_that_does_more_stays_and_is_listed():
    class Shifted(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    net = nn.Sequential(nn.Linear(4, 4), Shifted(4))
    with pytest.raises(NoEffectError, match=r"1 \(Shifted\) is no plain norm"):
        norm.rms(net)
    net.append(nn.LayerNorm(4))
    assert [(c.path, c.after.split(":")[0]) for c in norm.rms(net)][1:] == [("1", "not reached")]
    assert [type(m) for m in net[1:]] == [Shifted, LastRMSNorm]


def test_a_subclass_in_name_only_is_plain():
    class Odd(nn.LayerNorm):
        pass

    net = Tokens(Odd)
    norm.rms(net)
    assert type(net.norm) is LastRMSNorm


def test_a_layer_norm_of_pixels_is_seen_as_one():
    x, net = torch.randn(2, 8, 5, 5), nn.Sequential(Pixels(8))
    norm.rms(net)
    assert type(net[0]) is PixelRMSNorm
    net = nn.Sequential(Pixels(8))
    assert norm.layer(net)[0].after == "kept"
    norm.group(net, groups=2)
    torch.testing.assert_close(net(x), F.group_norm(x, 2))


def test_a_look_alike_is_replaced_with_its_gain_and_eps():
    net = nn.Sequential(nn.Linear(6, 6), Root(6))
    nn.init.uniform_(net[1].weight)
    gain, x = net[1].weight, torch.randn(2, 5, 6)
    assert norm.rms(net)[0].after == "kept"
    assert isinstance(net[1], Root)
    norm.layer(net)
    assert net[1].weight is gain
    torch.testing.assert_close(net[1](x), F.layer_norm(x, [6], gain))
    assert net[1].eps == 1e-5


def test_what_is_only_called_a_norm_stays_and_is_listed():
    class OffsetNorm(Root):
        pass

    net = nn.Sequential(nn.LayerNorm(6), OffsetNorm(6, offset=1.0))
    changes = norm.rms(net)
    assert [(c.path, c.after.split(":")[0]) for c in changes[1:]] == [("1", "not reached")]
    assert isinstance(net[1], OffsetNorm)
    with pytest.raises(NoEffectError, match=r"0 \(OffsetNorm\) is no plain norm"):
        norm.rms(nn.Sequential(OffsetNorm(6, offset=1.0)))


def test_frozen_and_synchronised_batch_norm():
    net = nn.Sequential(nn.SyncBatchNorm(4), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 4, 3, 3)
    assert norm.batch(net)[0].after == "kept"
    norm.group(net, sample=x)
    assert isinstance(net[0], GroupNorm)
    with pytest.raises(NoEffectError, match="FrozenBatchNorm2d"):
        norm.batch(nn.Sequential(FrozenBatchNorm2d(4)), sample=x)


class Auxiliary(nn.Module):
    """A head that acts in training mode only, on a signal of one value per channel."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.extra = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x):
        x = self.bn(self.conv(x))
        y = self.fc(x.mean((2, 3)))
        return y + self.extra(x) if self.training else y


def test_heads_of_training_mode_are_seen_too():
    net, x = Auxiliary().eval(), torch.randn(1, 3, 5, 5)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError, match=r"single value at extra\.1"):
        norm.instance(net, sample=x)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any(m.training for m in net.modules())


# Insertion.


def plain_net():
    shared = nn.ReLU()
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3), shared, nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), shared
    )
    head = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Linear(16, 4), nn.ReLU())
    return nn.Sequential(features, head)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("sample", [torch.randn(4, 3, 6, 6), None])
def test_insertion_behind_layers_that_an_activation_follows(fill, sample):
    if sample is None and fill is norm.instance:
        return  # only a sample shows that the linear layer has one value per channel
    net = plain_net()
    names = list(net.state_dict())
    with pytest.raises(NoEffectError, match=r"write norm\.insert=true"):
        fill(net, sample=sample)
    changes = fill(net, sample=sample, insert=True)
    done = [c.path for c in changes if not c.after.startswith("no norm")]
    assert done == ["0.0", "0.4", "1.1"][: 2 if fill is norm.instance else 3]
    assert [c.path for c in changes if c.path not in done] == (["1.1"] if fill is norm.instance else [])
    assert isinstance(net[0][0], nn.Conv2d)
    assert [name for name in net.state_dict() if ".norm." not in name] == names
    net(torch.randn(4, 3, 6, 6)).sum().backward()


class Functions(nn.Module):
    """Convolutions with activations that are functions; what follows fc2 is a gate, and fc3 is the classifier."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.b(F.relu(self.a(x))).relu().mean((2, 3))
        x = torch.sigmoid(self.fc2(x)) * F.silu(self.fc1(x), inplace=True)
        return F.relu(self.fc3(x))


class Branching(Functions):
    def forward(self, x):
        return super().forward(x) if x.mean() < 9 else x


def test_insertion_before_functions():
    x = torch.randn(4, 3, 6, 6)
    for net, sample in ((Functions(), x), (Functions(), None), (Branching(), x)):
        changes = norm.batch(net, sample=sample, insert=True)
        assert [c.path for c in changes] == ["a", "b", "fc1"]
        torch.testing.assert_close(net.b(x[:, [0, 1, 2, 0]]).mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match=r"norm\.batch with insert=true needs sample="):
        norm.batch(Branching(), insert=True)


def test_insertion_of_tokens_and_its_limits():
    x = torch.randn(2, 5, 6)
    net = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    norm.batch(net, sample=x, insert=True)
    assert type(net[0].norm) is TokenBatchNorm
    with pytest.raises(InputError, match="position=before_activation"):
        norm.batch(plain_net(), insert=True, position="after_activation")
    with pytest.raises(NoEffectError, match="followed by an activation"):
        norm.batch(nn.Sequential(nn.Linear(4, 2)), insert=True)
    net = tv.squeezenet1_1(num_classes=5)
    changes = norm.batch(net, sample=torch.randn(2, 3, 32, 32), insert=True)
    assert len(changes) == 25
    assert isinstance(net.classifier[1], nn.Conv2d)


def test_insert_leaves_models_with_norms_to_replacement():
    net = net_of_others()
    changes = norm.group(net, insert=True)
    assert [c.path for c in changes] == ["shared.1", "again.1", "deep.branch.0.0", "head.2"]


@pytest.mark.parametrize("fill", FILLS)
def test_without_norms_or_places_there_is_nothing_to_do(fill):
    with pytest.raises(NoEffectError, match="no norm layer"):
        fill(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))


def test_weight_needs_more_than_a_classifier():
    with pytest.raises(NoEffectError):
        norm.weight(mlp(1, 5, 8, widths=[]))


def test_norms_of_others_cannot_be_moved():
    with pytest.raises(InputError, match="cannot move bn1"):
        norm.batch(tv.resnet18(), position="after_activation")


@pytest.mark.parametrize(
    ("fill", "bad"),
    [
        (norm.batch, {"position": "before"}),
        (norm.batch, {"momentum": 1.5}),
        (norm.batch, {"eps": 0}),
        (norm.ghost_batch, {"ghost_size": 1}),
        (norm.ghost_batch, {"ghost_size": 2.5}),
        (norm.group, {"groups": 0}),
        (norm.group, {"groups": 2.0}),
        (norm.layer, {"eps": -1.0}),
        (norm.instance, {"eps": "small"}),
        (norm.rms, {"eps": 0.0}),
        (norm.spectral, {"n_power_iterations": 0}),
        (norm.spectral, {"eps": 0}),
    ],
)
def test_bad_values_are_named(fill, bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        fill(cnn(1, 5, 8), **bad)


def test_rms_of_half_precision_does_not_overflow():
    x = torch.full((1, 4, 2, 2), 1e4, dtype=torch.float16)
    torch.testing.assert_close(RMSNorm(4).half()(x), torch.ones_like(x))

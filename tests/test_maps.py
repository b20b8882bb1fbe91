"""Where feature maps are bent: by modules, by functions, with channels second or last, and where they are not."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from knep.errors import InputError, NoEffectError
from knep.recipes import dropout
from knep.surgery.edit import modules_of


class Functions(nn.Module):
    """One function bends maps at every call, one vectors, one a map of one pixel."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.squeeze, self.fc, self.out = nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = self.second(x).relu_()
        gate = torch.sigmoid(self.squeeze(F.silu(x.mean((2, 3), keepdim=True))))
        return self.out(F.relu(self.fc((x * gate).mean((2, 3)))))


class Unreadable(Functions):
    def forward(self, x):
        return super().forward(x if x.sum() < 1e9 else -x)


class ByMode(Functions):
    def forward(self, x):
        x = F.relu(self.first(x))
        return self.out((F.relu(self.second(x)) if self.training else x).mean((2, 3)))


def small_convnext():
    setting = [tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)]
    return tv.ConvNeXt(setting, num_classes=3)


def small_swin():
    return SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3)


def small_vit():
    return tv.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3)


@pytest.mark.parametrize("trick", [dropout.spatial, dropout.dropblock])
def test_functions_that_bend_maps_are_followed_by_it(trick):
    net, x = Functions(), torch.randn(4, 3, 8, 8)
    plain = copy.deepcopy(net)
    changes = trick(net, sample=x, p=0.5)
    name = trick.__name__
    assert [(c.path, c.before) for c in changes] == [(name, "Functions: relu"), (f"{name}_2", "Functions: relu_")]
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(net.eval()(x), plain(x))
    net.train()
    assert not torch.equal(net(x), net(x))
    seen = []
    net.second.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net(x)
    assert (seen[0] == 0).float().mean() > (F.relu(net.first(x)) == 0).float().mean()


@pytest.mark.parametrize(("make", "count"), [(small_convnext, 2), (small_swin, 2)])
def test_channels_may_be_last(make, count):
    net, x = make(), torch.randn(2, 3, 32, 32)
    assert len(dropout.spatial(net, sample=x, p=0.5)) == count
    seen = []
    drop = next(m for _, m in modules_of(net, nn.Dropout2d))
    drop.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    net(x).sum().backward()
    before, after = seen[0]
    assert before.shape[1] == 32  # 4 x 8 channels, moved to the second axis
    assert ((after == 0).flatten(2).all(2) | (after == 2 * before).flatten(2).all(2)).all()
    assert 0 < (after == 0).flatten(2).all(2).float().mean() < 1
    assert torch.equal(net.eval()(x), net(x))


@pytest.mark.parametrize("make", [Functions, small_convnext, small_swin])
def test_p_of_zero_changes_no_bit(make):
    net, x = make(), torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(net)
    dropout.spatial(net, sample=x, p=0.0)
    for training in (True, False):
        outputs = []
        for model in (net, plain):
            torch.manual_seed(0)
            outputs.append(model.train(training)(x))
        assert torch.equal(*outputs)


def test_tokens_are_no_maps():
    with pytest.raises(NoEffectError, match="no feature maps"):
        dropout.spatial(small_vit(), sample=torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(("make", "reason"), [(Unreadable, "cannot read"), (ByMode, "not do the same in training")])
def test_forwards_that_cannot_be_changed_are_refused_by_name(make, reason):
    net = nn.Sequential(make())
    with pytest.raises(InputError, match=rf"dropout\.spatial: 0: .*{reason}"):
        dropout.spatial(net, sample=torch.randn(2, 3, 8, 8))

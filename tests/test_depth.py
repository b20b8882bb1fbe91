"""Depth on other people's models: layers that a person would count, whatever the order of registration."""

import pytest
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.resnet import BasicBlock

from knep.surgery.layer_depth import depths_of


def named_depths(model, x):
    found = depths_of(model, x, lambda p: p.ndim > 1 and len(p) > 1)  # tables and tokens are of length 1
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_a_residual_net_has_its_layers():
    depths = named_depths(tv.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3), torch.randn(2, 3, 32, 32))
    assert max(depths.values()) + 1 == 10
    assert depths["layer2.0.downsample.0.weight"] == depths["layer2.0.conv1.weight"] == 3
    assert depths["layer2.0.bn2.weight"] == depths["layer2.0.conv2.weight"] == 4


def test_a_transformer_has_four_layers_a_block():
    vit = tv.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3)
    depths = named_depths(vit, torch.randn(2, 3, 32, 32))
    assert {depths[name] for name in ("class_token", "encoder.pos_embedding", "conv_proj.weight")} == {0}
    assert depths["encoder.layers.encoder_layer_1.self_attention.in_proj_weight"] == 5
    assert depths["heads.head.weight"] == 9


class Words(nn.Module):
    """Reads whole numbers; its classifier shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.words, self.fc, self.unused = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 5)
        self.out.weight = self.words.weight

    def forward(self, ids):
        return {"logits": self.out(self.fc(self.words(ids)).relu())}


def test_a_shared_weight_has_its_earliest_depth_and_what_never_acts_has_none():
    depths = named_depths(Words(), torch.tensor([[1, 2], [3, 4]]))
    assert depths == {"words.weight": 0, "fc.weight": 1, "fc.bias": 1, "out.bias": 2}


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_of_the_model_changes(grad):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).requires_grad_(grad)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        assert max(named_depths(model, torch.randn(2, 3, 8, 8)).values()) == 1
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert {p.requires_grad for p in model.parameters()} == {grad}


class Caching(nn.Linear):
    """Keeps what it computed of its weight in eval mode until it trains, as LeViT's attention does."""

    cache = None

    def train(self, mode=True):
        self.cache = None if mode else self.cache
        return super().train(mode)

    def forward(self, x):
        if self.cache is None:
            self.cache = self.weight.t()
        return x @ self.cache


def test_what_a_model_keeps_of_a_pass_is_cleared():
    model = nn.Sequential(Caching(4, 4), nn.Linear(4, 2)).eval()
    named_depths(model, torch.randn(2, 4))
    assert model[0].cache is None
    assert not model.training


def test_shapes_are_enough():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert max(named_depths(model, torch.randn(2, 4)).values()) == 1

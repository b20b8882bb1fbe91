import pytest
import torch
from torch import nn

from knep.errors import InputError
from knep.models.mlp import mlp
from knep.nn.place import Place
from knep.surgery.edit import modules_of


def test_is_linear_act_linear():
    model = mlp(1, 3, 4, widths=[5])
    layer = model.layers[0]
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(model(x), model.classifier(layer.linear(x.flatten(1)).relu()))


def test_counts_by_hand():
    assert sum(p.numel() for p in mlp(1, 10, 8, widths=[32, 16]).parameters()) == 65 * 32 + 33 * 16 + 17 * 10


def test_no_hidden_layer_is_softmax_regression():
    assert [type(m) for m in mlp(1, 10, 8, widths=[]).modules() if not list(m.children())][-1] is nn.Linear
    assert sum(p.numel() for p in mlp(1, 10, 8, widths=[]).parameters()) == 650


def test_the_last_hidden_layer_has_the_head_place_alone():
    kinds = [m.kind for _, m in modules_of(mlp(1, 10, 8, widths=[4, 4, 4]), Place)]
    assert kinds.count("hidden") == 2
    assert kinds.count("head") == 1


@pytest.mark.parametrize("widths", [[0], [8, -1], [2.5], ["8"]])
def test_widths_are_positive_whole_numbers(widths):
    with pytest.raises(InputError, match="widths"):
        mlp(1, 10, 8, widths=widths)

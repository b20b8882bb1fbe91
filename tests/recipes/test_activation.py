import inspect

import pytest
import torch
import torchvision.models as tv
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from knep.errors import InputError, NoEffectError
from knep.listing import CONF, options
from knep.models.cnn import cnn
from knep.models.inception import inception
from knep.models.mlp import mlp
from knep.models.resnet import resnet
from knep.recipes import activation

X = torch.linspace(-6, 6, 1001, dtype=torch.float64)


def equals(trick, reference, **hp):
    """Both activations of an MLP become the reference, and nothing else changes."""
    model = mlp(1, 3, 4, widths=[5, 5]).double()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    changes = trick(model, **hp)
    assert [c.path for c in changes] == ["layers.0.act", "layers.1.act"]
    for layer in model.layers:
        torch.testing.assert_close(layer.act(X), reference(X))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


ROWS = {
    "relu": lambda: equals(activation.relu, lambda x: x.clamp(min=0)),
    "leaky_relu": lambda: equals(activation.leaky_relu, lambda x: torch.where(x > 0, x, 0.2 * x), negative_slope=0.2),
    "gelu": lambda: equals(activation.gelu, lambda x: x * torch.special.ndtr(x)),
    "silu": lambda: equals(activation.silu, lambda x: x / (1 + (-x).exp())),
    "mish": lambda: equals(activation.mish, lambda x: x * (1 + x.exp()).log().tanh()),
    "selu": lambda: equals(
        activation.selu, lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * x.expm1())
    ),
    "tanh": lambda: equals(activation.tanh, lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())),
    "sigmoid": lambda: equals(activation.sigmoid, lambda x: 1 / (1 + (-x).exp())),
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option):
    ROWS[option]()


@pytest.mark.parametrize("option", options("activation"))
def test_yaml_says_the_functions_own_values(option):
    node = OmegaConf.load(CONF / "activation" / f"{option}.yaml")
    own = {k: p.default for k, p in inspect.signature(getattr(activation, option)).parameters.items()}
    keys = [k for k in node if k not in ("_target_", "_partial_")]
    assert set(keys) == set(own) - {"model", "sample"}
    assert OmegaConf.create({k: node[k] for k in keys}) == OmegaConf.create({k: own[k] for k in keys})
    instantiate(node)


def test_none_changes_nothing():
    model = cnn(1, 3, 8)
    before = list(model.modules())
    assert activation.none(model) == []
    assert list(model.modules()) == before


def test_gelu_by_the_faster_formula():
    equals(activation.gelu, lambda x: F.gelu(x, approximate="tanh"), approximate="tanh")


@pytest.mark.parametrize("make", [cnn, resnet, inception])
def test_every_unit_is_reached(make):
    model = make(3, 5, 16)
    relus = sum(isinstance(m, nn.ReLU) for m in model.modules())
    assert len(activation.mish(model)) == relus == sum(isinstance(m, nn.Mish) for m in model.modules())
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    model(torch.randn(2, 3, 16, 16)).sum().backward()


def test_what_is_right_already_is_kept_and_says_so():
    model = cnn(1, 3, 8)
    before = list(model.modules())
    assert {c.after for c in activation.relu(model)} == {"kept"}
    assert list(model.modules()) == before


def test_a_shared_unit_becomes_one_shared_unit():
    net = tv.resnet18(num_classes=5)
    activation.silu(net)
    assert sum(isinstance(m, nn.SiLU) for m in net.modules()) == 9  # the stem's, and one per block for both its uses
    assert all(m.inplace for m in net.modules() if isinstance(m, nn.SiLU))
    net(torch.randn(2, 3, 32, 32)).sum().backward()


class Overwriting(nn.Module):
    """What efficientnet_v2 and mobilenet_v3 do: the backward of SiLU and Hardswish does not read their output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.act1, self.act2, self.drop = nn.SiLU(inplace=True), nn.Hardswish(), nn.Dropout(inplace=True)

    def forward(self, x):
        h = self.act1(self.a(x))
        h += x
        return self.c(self.drop(self.act2(self.b(h))))


@pytest.mark.parametrize("trick", [getattr(activation, option) for option in ROWS])
def test_an_output_that_is_overwritten_is_copied_first(trick):
    net, x = Overwriting(), torch.randn(2, 4)
    trick(net, sample=x)
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_gates_stay_gates():
    for make, gate in ((tv.efficientnet_b0, nn.Sigmoid), (tv.mobilenet_v3_small, nn.Hardsigmoid)):
        net = make(num_classes=5)
        gates = [m for m in net.modules() if isinstance(m, gate)]
        activation.gelu(net, sample=torch.randn(2, 3, 32, 32))
        assert gates
        assert [m for m in net.modules() if isinstance(m, gate)] == gates
        net(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("trick", [activation.sigmoid, activation.tanh])
def test_sigmoids_between_layers_are_activations(trick):
    model, sample = mlp(1, 3, 4, widths=[5, 5]), torch.randn(2, 1, 4, 4)
    trick(model)
    assert len(activation.relu(model, sample=sample)) == 2
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 2


def test_a_sigmoid_at_the_end_is_an_output():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid())
    activation.gelu(net, sample=torch.randn(2, 4))
    assert [type(m) for m in net] == [nn.Linear, nn.GELU, nn.Linear, nn.Sigmoid]


def test_functions_are_out_of_reach():
    class Functional(nn.Module):
        def forward(self, x):
            return F.relu(x)

    with pytest.raises(NoEffectError, match=r"F\.relu"):
        activation.gelu(Functional())


@pytest.mark.parametrize(
    ("trick", "bad"),
    [
        (activation.leaky_relu, {"negative_slope": 1.0}),
        (activation.leaky_relu, {"negative_slope": -0.1}),
        (activation.gelu, {"approximate": "exact"}),
    ],
)
def test_bad_values_are_named(trick, bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        trick(cnn(1, 3, 8), **bad)

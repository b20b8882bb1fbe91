import copy
import inspect
import io
import math
from contextlib import contextmanager

import pytest
import torch
import torchvision.models as tv
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import leaky_relu
from torch.overrides import TorchFunctionMode
from torchvision.models.googlenet import BasicConv2d
from transformers.activations import ACT2FN

from knep.config.catalog import CONF, options
from knep.errors import InputError, NoEffectError
from knep.models.cnn import cnn
from knep.models.inception import inception
from knep.models.mlp import mlp
from knep.models.resnet import resnet
from knep.recipes import activation
from knep.surgery.edit import describe

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


# Activations that are called as functions.


class Functions(nn.Module):
    """All the ways to call one, in a forward with branches, a helper, defaults, private names and a dropout."""

    def __init__(self):
        super().__init__()
        self.__conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc, self.head, self.slope, self.act = nn.Linear(4, 4), nn.Linear(4, 2), 0.2, F.elu

    def pooled(self, x):
        return torch.relu(x).mean((2, 3))

    def forward(self, x, mask=None, *, scale=2.0):
        """Documented."""
        x = self.pooled(F.relu(self.norm(self.__conv(x)), inplace=True))
        x = leaky_relu(self.fc(x), self.slope)
        if mask is not None:
            x = x * mask
        if self.training:
            x = self.fc(x).relu()
        y = self.fc(F.dropout(x, 0.5, training=self.training))
        y.relu_()
        y = F.silu(input=self.act(y))
        return self.head(torch.tanh(y) * torch.sigmoid(y)) * scale


class Child(Functions):
    def forward(self, x, mask=None, *, scale=2.0):
        return super().forward(x, mask, scale=scale)


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES = [f"activation_{i}" for i in range(6)]


def functions():
    torch.manual_seed(0)
    return Functions().eval()


@pytest.mark.parametrize("sample", [None, IMAGES])
def test_functions_become_children(sample):
    net, twin = functions(), functions()
    changes = activation.gelu(net, sample=sample)
    assert [c.path for c in changes] == ["act", *NAMES]
    assert changes[1].before == "relu, called in Functions.pooled"
    assert list(net.state_dict()) == list(twin.state_dict())
    assert isinstance(net, Functions)
    assert inspect.signature(net.forward) == inspect.signature(twin.forward)
    for name in ("act", *NAMES):
        assert isinstance(getattr(net, name), nn.GELU)
        setattr(net, name, nn.Identity())
    pooled = net._Functions__conv(IMAGES).mean((2, 3)) / (1 + net.norm.eps) ** 0.5
    y = net.fc(net.fc(pooled))
    torch.testing.assert_close(net(IMAGES), net.head(y.tanh() * y.sigmoid()) * 2)


def test_branches_arguments_and_modes_of_the_forward_stay():
    net, twin = functions(), functions()
    activation.gelu(net)
    relu = copy.deepcopy(net)
    activation.relu(relu)
    for name, m in (("act", nn.ELU()), ("activation_2", nn.LeakyReLU(0.2)), ("activation_5", nn.SiLU())):
        setattr(relu, name, m)
    for mode, mask, scale in ((False, None, 2.0), (True, None, 2.0), (False, torch.zeros(4), 3.0)):
        torch.manual_seed(1)
        want = twin.train(mode)(IMAGES, mask, scale=scale)
        torch.manual_seed(1)
        assert torch.equal(relu.train(mode)(IMAGES, mask, scale=scale), want)
        assert not torch.equal(net.train(mode)(IMAGES, mask, scale=scale), want)


def test_calls_that_are_right_already_are_kept_to_the_bit():
    net, twin = functions(), functions()
    changes = activation.relu(net, sample=IMAGES)
    assert [c.path for c in changes if c.after != "kept"] == ["act", "activation_2", "activation_5"]
    only = nn.Sequential(nn.Conv2d(3, 4, 1), BasicConv2d(4, 4, kernel_size=1))
    cls, before = type(only[1]), only(IMAGES)
    assert [c.after for c in activation.relu(only, sample=IMAGES)] == ["kept"]
    assert type(only[1]) is cls
    assert torch.equal(only(IMAGES), before)
    assert sorted(dict(net.named_children()).keys() - dict(twin.named_children())) == [
        "act",
        "activation_2",
        "activation_5",
    ]


def test_copies_pickles_and_further_surgery_keep_the_children():
    net = functions()
    activation.gelu(net)
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(net), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(IMAGES), net(IMAGES))
        twin.activation_0 = nn.Tanh()
        assert not torch.equal(twin(IMAGES), net(IMAGES))
    assert [c.path for c in activation.silu(net)] == ["act", *NAMES]
    assert "self.activation_0(x)" in inspect.getsource(type(net).pooled)


def test_a_function_that_overwrites_may_stand_alone():
    class Alone(nn.Module):
        def forward(self, x):
            x = x + 0
            F.relu_(x)
            F.relu(x + 1, inplace=True)
            return x

    net = Alone()
    assert len(activation.gelu(net)) == 1
    torch.testing.assert_close(net(X), F.gelu(X))


def test_what_overwrites_a_functions_output_gets_a_copy():
    class Adds(nn.Module):
        def forward(self, x):
            y = F.hardswish(x)
            y += 1
            return y

    net, x = Adds(), torch.randn(4, requires_grad=True)
    activation.tanh(net, sample=x[None])
    net(x).sum().backward()


def test_torchvisions_functions():
    for make, blocks in ((tv.densenet121, 1), (tv.googlenet, 61)):
        net = make(num_classes=5, **({"init_weights": False} if make is tv.googlenet else {}))
        activation.mish(net, sample=torch.randn(2, 3, 64, 64))
        with unused_functions():
            net.eval()(torch.randn(2, 3, 64, 64))
        names = [path for path, m in net.named_modules() if isinstance(m, nn.Mish) and "activation_" in path]
        assert len(names) == blocks


@contextmanager
def unused_functions():
    """Fails where torch.relu or F.relu is called."""

    class Refuse(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            assert func not in (F.relu, torch.relu, torch.relu_, torch.Tensor.relu)
            return func(*args, **(kwargs or {}))

    with Refuse():
        yield


def test_gates_that_are_functions_stay_and_hidden_ones_go():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.b(torch.sigmoid(self.a(x)))
            return torch.sigmoid(self.c(x * F.hardsigmoid(x) + F.relu(x)))

    net = Gated()
    assert [c.before for c in activation.gelu(Gated())] == ["relu, called in Gated.forward"]
    changes = activation.gelu(net, sample=torch.randn(2, 4))
    *changed, output = changes
    assert sorted(c.before for c in changed) == ["relu, called in Gated.forward", "sigmoid, called in Gated.forward"]
    assert (output.before, output.after) == ("sigmoid, called in Gated.forward", "kept: it is the model's output")
    assert [type(m) for m in net.children()].count(nn.GELU) == 2


def helper(x):
    return F.relu(x)


class Unreachable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return helper(self.fc(x))


def test_what_could_not_be_reached_is_named():
    x = torch.randn(2, 4)
    with pytest.raises(NoEffectError, match=r"1: relu\(\) is not reached: .* Unreachable"):
        activation.gelu(nn.Sequential(nn.Linear(4, 4), Unreachable()), sample=x)
    changes = activation.gelu(nn.Sequential(nn.ReLU(), Unreachable()), sample=x)
    assert [c.path for c in changes] == ["0", "1"]
    assert changes[1].after.startswith("not reached")
    with pytest.raises(NoEffectError, match=r"F\.relu"):
        activation.gelu(Unreachable())
    changes = activation.gelu(Child(), sample=IMAGES)
    assert {c.before for c in changes if c.after.startswith("not")} == {"relu()", "leaky_relu()", "relu_()", "silu()"}


def test_a_failing_look_leaves_the_model_as_it_was():
    net = functions()
    with pytest.raises(RuntimeError):
        activation.gelu(net, sample=torch.randn(2, 5, 8, 8))
    assert type(net) is Functions
    assert net.act is F.elu
    assert [name for name, _ in net.named_children()] == ["_Functions__conv", "norm", "fc", "head"]


def test_an_attribute_that_is_given_more_than_a_signal_stays():
    class More(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.relu = F.elu, nn.ReLU()

        def forward(self, x):
            return self.relu(self.act(x, inplace=True)).sum(1)

    net = More()
    changes = activation.gelu(net, sample=torch.randn(2, 4))
    assert [(c.path, c.after.split(":")[0]) for c in changes] == [
        ("relu", "GELU(approximate='none')"),
        ("act", "not reached"),
    ]
    assert net.act is F.elu


@pytest.mark.parametrize("kind", [F.relu, nn.GELU()])
def test_the_fused_path_of_transformers_has_the_new_activation(kind):
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, activation=kind, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 8)
    assert [c.path for c in activation.tanh(net, sample=x)] == ["layers.0.activation"]
    layer = net.layers[0]
    h = layer.norm1(x + layer.self_attn(x, x, x)[0])
    with torch.no_grad():
        torch.testing.assert_close(net(x), layer.norm2(h + layer.linear2(layer.linear1(h).tanh())))


def test_a_subclass_that_does_more_stays_and_is_listed():
    class Twice(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    class Same(nn.PReLU):
        def forward(self, x):
            return F.prelu(x, self.weight)

    net = nn.Sequential(Twice(), Same())
    changes = activation.silu(net)
    assert [(c.path, c.after.split(":")[0]) for c in changes] == [("1", "SiLU()"), ("0", "not reached")]
    assert type(net[0]) is Twice


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


class Ends(nn.Module):
    """Stages that are given and read, and an output that a function squashes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.act1, self.act2, self.out = nn.ReLU(), nn.ReLU(), nn.Tanh()

    def forward(self, x):
        low = self.act1(self.a(x))
        high = self.act2(self.b(low))
        return {"stages": [low, high], "image": (self.out(self.c(high)).flatten(1) + 1) / 2}


def test_an_output_activation_stays_and_is_listed():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3), nn.Sigmoid(), nn.Flatten())
    changes = activation.gelu(net, sample=IMAGES)
    assert [(c.path, c.after) for c in changes] == [("1", describe(nn.GELU())), ("3", "kept: it is the model's output")]
    assert 0 <= net(IMAGES).min() <= net(IMAGES).max() <= 1
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU())
    assert [c.path for c in activation.gelu(net, sample=torch.randn(2, 4)) if c.after.startswith("kept")] == ["3"]
    net = Ends()
    after = {c.path: c.after for c in activation.silu(net, sample=IMAGES)}
    assert after == {"act1": "SiLU()", "act2": "SiLU()", "out": "kept: it is the model's output"}


def test_the_activations_of_a_frozen_part_stay_and_are_listed():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    changes = activation.gelu(net, sample=torch.randn(2, 4))
    assert [(c.path, c.after) for c in changes] == [("2", describe(nn.GELU())), ("0.1", "kept: frozen")]
    assert isinstance(net[0][1], nn.ReLU)


class TanhGELU(nn.Module):
    """GELU by its formula, without a call of it."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(3 * x)


class SquaredReLU(nn.Module):
    """Of another range than relu: recognised by its name, and exchanged whole."""

    def forward(self, x):
        return F.relu(x).square()


class Halves(nn.Module):
    """No function of single values, though it ends like one."""

    def forward(self, x):
        return torch.sigmoid(x - x.mean(-1, keepdim=True)) * x


@pytest.mark.parametrize(
    "old", [TanhGELU, SquaredReLU, "gelu_new", "gelu_fast", "quick_gelu", "gelu_pytorch_tanh", "relu2"]
)
def test_classes_of_ones_own_are_exchanged_as_a_whole(old):
    made = ACT2FN[old] if isinstance(old, str) else old()
    net, x = nn.Sequential(nn.Linear(4, 4), made, nn.Linear(4, 2)), torch.randn(3, 4)
    (change,) = activation.mish(net, sample=x)
    assert (change.path, type(net[1])) == ("1", nn.Mish)
    torch.testing.assert_close(net(x), net[2](F.mish(net[0](x))))


def test_what_bends_and_is_not_known_is_listed_and_refused_alone():
    net, x = (
        nn.Sequential(nn.Linear(4, 4), Sine(), Halves(), nn.Softplus(), nn.ReLU(), nn.Linear(4, 2)),
        torch.randn(3, 4),
    )
    done, *left = activation.mish(net, sample=x)
    assert done.path == "4"
    assert [(c.path, c.after.partition(":")[0]) for c in left] == [("1", "not reached"), ("3", "not reached")]
    with pytest.raises(NoEffectError, match=r"1: Sine\(\) is not reached: .*no activation known"):
        activation.mish(nn.Sequential(nn.Linear(4, 4), Sine(), nn.Linear(4, 2)), sample=x)


def test_a_gate_of_ones_own_stays_a_gate():
    class Gate(nn.Module):
        def forward(self, x):
            return torch.sigmoid(x)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.gate, self.act = nn.Linear(4, 4), nn.Linear(4, 4), Gate(), TanhGELU()

        def forward(self, x):
            return self.act(self.one(x)) * self.gate(self.two(x)) + x

    net = Gated()
    (change,) = activation.relu(net, sample=torch.randn(3, 4))
    assert change.path == "act"
    assert type(net.gate) is Gate

"""Diseases of a model: each is named first on nets that have it, none is certain on nets that learn."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from knep.doctor.findings import Finding
from knep.doctor.model.examine import model_findings
from knep.doctor.model.gradient_flow import looks_drawn
from knep.doctor.model.healthy_ranges import healthy, quantile
from knep.doctor.model.rectified import rectified, unrectified
from knep.doctor.model.signal_pass import signals
from knep.doctor.subject import setup as patients
from knep.doctor.subject.setup import Patient

_DIGITS = load_digits()
_X = torch.tensor(_DIGITS.images, dtype=torch.float32)[:, None]
_X, _Y = (_X - _X.mean()) / _X.std(), torch.tensor(_DIGITS.target)

normal = lambda std: partial(nn.init.normal_, std=std)  # noqa: E731
value = lambda c: partial(nn.init.constant_, val=c)  # noqa: E731


def patient_of(model: nn.Module, size: int = 64, optimizer=None, scale: float = 1.0, **changes) -> Patient:
    batches = [(scale * _X[i : i + size], _Y[i : i + size]) for i in range(0, 512, size)]
    make = optimizer or (lambda m: torch.optim.Adam(m.parameters(), 1e-3))
    return replace(patients.of(model, batches, batches[:1], optimizer=make, num_classes=10, epochs=20), **changes)


def found(patient: Patient) -> list[Finding]:
    return model_findings(patient, signals(patient))


def mlp(depth=2, width=48, act=nn.ReLU, init=None, bias=None, norm=None, end=None) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    before = 64
    for _ in range(depth):
        layers += [nn.Linear(before, width), *([norm(width)] if norm else []), act()]
        before = width
    model = nn.Sequential(*layers, nn.Linear(before, 10), *([end()] if end else []))
    for layer in model:
        if isinstance(layer, nn.Linear):
            if init:
                init(layer.weight)
            if bias:
                bias(layer.bias)
    return model


def cnn(momentum=0.1, norm=True, init=None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, width in ((1, 8), (8, 16)):
        conv = nn.Conv2d(before, width, 3, padding=1)
        if init:
            init(conv.weight)
        layers += [conv, *([nn.BatchNorm2d(width, momentum=momentum)] if norm else []), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


class Functional(nn.Module):
    def __init__(self, cut="", end=""):
        super().__init__()
        self.cut, self.end = cut, end
        self.conv = nn.Conv2d(1, 8, 3, stride=2)
        self.fc1, self.fc2 = nn.Linear(72, 32), nn.Linear(32, 10)
        self.spare = nn.Linear(32, 32) if cut == "spare" else None

    def forward(self, x):
        x = F.relu(self.conv(x)).flatten(1)
        x = x.detach() if self.cut == "detach" else x.round() if self.cut == "round" else x
        x = self.fc2(F.relu(self.fc1(x)))
        x = x.detach() if self.cut == "all" else x
        return F.softmax(x, 1) if self.end == "softmax" else F.log_softmax(x, 1) if self.end == "log" else x


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(names))
    return model


def zero_head() -> nn.Sequential:
    model = mlp(3)
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


class Residual(nn.Module):
    """Blocks that start as the identity, behind a projection."""

    def __init__(self, norm=True):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2)
        last = (lambda: nn.BatchNorm2d(16)) if norm else (lambda: nn.Conv2d(16, 16, 1, bias=False))
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), last()) for _ in "123")
        for branch in self.branches:
            nn.init.zeros_(branch[1].weight)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = F.relu(x + branch(x))
        return self.head(x.mean((2, 3)))


def last_two(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(model.parameters())[-2:], 0.1)


def first_still(model: nn.Module) -> torch.optim.Optimizer:
    weights = list(model.parameters())
    return torch.optim.SGD([{"params": weights[:2], "lr": 0.0}, {"params": weights[2:]}], lr=0.1)


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01)


_NARROW = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Tanh(), nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 10)]

# name: (patient, disease on top, certain, what its evidence must name)
SICK = {
    "sigmoid, 8 layers": (lambda: patient_of(mlp(8, act=nn.Sigmoid)), "vanishing_gradient", True, "at 1 is"),
    "tiny weights": (lambda: patient_of(mlp(3, init=normal(1e-3))), "vanishing_gradient", True, "= 0.00"),
    "tiny, no biases": (lambda: patient_of(mlp(6, init=normal(0.01), bias=value(0))), "vanishing_gradient", True, "1"),
    "20 layers": (lambda: patient_of(mlp(20)), "vanishing_gradient", True, "20 layers"),
    "tiny filters": (lambda: patient_of(cnn(norm=False, init=normal(1e-3))), "vanishing_gradient", True, "at 0 "),
    "N(0, 1)": (lambda: patient_of(mlp(3, init=normal(1))), "exploding_gradient", True, "deviation"),
    "overflow": (lambda: patient_of(mlp(40, init=normal(50))), "exploding_gradient", True, "not finite"),
    "dead": (lambda: patient_of(mlp(3, bias=value(-5))), "dying_relu", True, "100% of the 48 units"),
    "tanh, N(0, 1)": (lambda: patient_of(mlp(3, act=nn.Tanh, init=normal(1))), "saturation", True, "(tanh)"),
    "sigmoid, N(0, 9)": (lambda: patient_of(mlp(3, act=nn.Sigmoid, init=normal(3))), "saturation", True, "(sigmoid)"),
    "constant": (lambda: patient_of(mlp(2, init=value(0.1), bias=value(0))), "symmetric_weights", True, "1 and 3"),
    "all zero": (lambda: patient_of(mlp(2, init=value(0), bias=value(0))), "symmetric_weights", True, "100%"),
    "constant filters": (lambda: patient_of(cnn(init=value(0.1))), "symmetric_weights", True, "100% of the units"),
    "large biases": (
        lambda: patient_of(mlp(8, act=nn.Tanh, init=nn.init.xavier_normal_, bias=normal(2))),
        "signal_collapse", True, "cosine 1 -",
    ),
    "100 layers": (lambda: patient_of(mlp(100, init=nn.init.kaiming_normal_)), "signal_collapse", False, "cosine"),
    "softmax": (lambda: patient_of(Functional(end="softmax")), "double_softmax", True, "by softmax"),
    "sigmoid": (lambda: patient_of(mlp(end=nn.Sigmoid)), "double_softmax", True, "by sigmoid"),
    "relu": (lambda: patient_of(mlp(end=nn.ReLU)), "dying_relu", False, "the scores themselves pass relu"),
    "wrong axis": (lambda: patient_of(mlp(end=lambda: nn.Softmax(0))), "double_softmax", True, "wrong axis"),
    "detach": (lambda: patient_of(Functional("detach")), "cut_off", True, "conv,"),
    "detached scores": (lambda: patient_of(Functional("all")), "cut_off", True, "no parameter"),
    "round": (lambda: patient_of(Functional("round")), "cut_off", True, "exactly zero"),
    "never called": (lambda: patient_of(Functional("spare")), "cut_off", True, "does not call"),
    "optimizer": (lambda: patient_of(mlp(), optimizer=last_two), "cut_off", True, "does not have 4 parameters"),
    "rate 0": (lambda: patient_of(mlp(), optimizer=first_still), "cut_off", True, "learning rate of 0"),
    "frozen": (lambda: patient_of(frozen(mlp(), "1.", "3.")), "frozen_parameters", True, "1 and 3"),
    "two images": (lambda: patient_of(cnn(), size=2), "tiny_norm_batches", False, "2 images x 16 places"),
    "four values": (lambda: patient_of(mlp(norm=nn.BatchNorm1d), size=4), "tiny_norm_batches", True, "= 4 values"),
    "no momentum": (lambda: patient_of(cnn(momentum=0.0)), "stale_statistics", True, "momentum=0"),
    "slow statistics": (lambda: patient_of(cnn(momentum=0.001)), "stale_statistics", False, "14.8%"),
    "bfloat16": (lambda: patient_of(mlp().bfloat16(), optimizer=plain_sgd), "precision_underflow", True, "bfloat16"),
    "bf16-true": (
        lambda: patient_of(mlp(), optimizer=plain_sgd, precision="bf16-true"), "precision_underflow", True, "loses",
    ),
    "one number": (lambda: patient_of(nn.Sequential(nn.Flatten(), *_NARROW)), "too_little_capacity", True, "1 number"),
}  # fmt: skip

HEALTHY = {
    "softmax regression": lambda: patient_of(mlp(0)),
    "mlp": lambda: patient_of(mlp()),
    "tanh": lambda: patient_of(mlp(4, act=nn.Tanh, init=nn.init.xavier_normal_)),
    "he, 10 layers": lambda: patient_of(mlp(10, init=nn.init.kaiming_normal_)),
    "cnn": lambda: patient_of(cnn()),
    "functional": lambda: patient_of(Functional()),
    "log_softmax": lambda: patient_of(Functional(end="log")),
    "softmax, negative log": lambda: patient_of(
        Functional(end="softmax"), loss=lambda s, y: F.nll_loss(s.clamp(min=1e-7).log(), y)
    ),
    "zero head": lambda: patient_of(zero_head()),
    "residual blocks at rest": lambda: patient_of(Residual()),
    "filters that start at zero": lambda: patient_of(Residual(norm=False)),
    "dropout": lambda: patient_of(nn.Sequential(mlp(2, act=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5))))),
}


@pytest.mark.parametrize("name", SICK)
def test_disease_is_on_top(name):
    build, disease, certain, word = SICK[name]
    top = found(build())[0]
    assert (top.disease, top.certain) == (disease, certain)
    assert word in top.evidence
    assert 0 < top.gravity <= 1


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found(name):
    assert [f.disease for f in found(HEALTHY[name]())] == []


@pytest.mark.parametrize("depth", [2, 3])
def test_sigmoid_nets_of_few_layers_are_at_most_suspected(depth):
    assert not any(f.certain for f in found(patient_of(mlp(depth, act=nn.Sigmoid))))


@pytest.mark.parametrize("scale", [255.0, 1e-3])
def test_inputs_of_an_odd_size_are_not_blamed_on_the_layers(scale):
    seen = found(patient_of(mlp(3), scale=scale))
    assert seen
    assert all(not f.certain and f.gravity < 0.5 for f in seen)


def test_symptoms_lie_behind_their_cause():
    order = [f.disease for f in found(patient_of(mlp(3, bias=value(-5))))]
    assert order[0] == "dying_relu"
    assert {"signal_collapse", "cut_off"} < set(order)
    by_weights = found(patient_of(mlp(3, init=normal(1e-3))))
    assert [f.disease for f in by_weights] == ["vanishing_gradient", "signal_collapse"]


def test_layers_are_named():
    top = found(patient_of(Functional("detach")))[0]
    assert top.layers == ("conv",)
    assert found(patient_of(frozen(mlp(), "1.")))[0].layers == ("1",)


def test_trained_weights_do_not_look_drawn():
    drawn = torch.randn(64, 100)
    assert looks_drawn(drawn)
    assert looks_drawn(nn.init.orthogonal_(torch.empty(64, 64)))
    assert not looks_drawn(drawn + 0.5 * torch.outer(torch.randn(64), torch.randn(100)))


def test_frozen_layers_of_a_trained_model_are_a_suspicion():
    model = frozen(mlp(), "1.", "3.")
    for layer in (model[1], model[3]):
        layer.weight.data += 0.2 * torch.outer(torch.randn(48), torch.randn(layer.in_features))
    assert next((f.disease, f.certain) for f in found(patient_of(model))) == ("frozen_parameters", False)


def test_examination_leaves_the_patient_alone():
    model = cnn()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    drawn = torch.get_rng_state()
    found(patient_of(model))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())


def test_healthy_marks_are_sorted_and_many():
    assert set(healthy()) == {
        "backward", "backward_layer", "dead", "forward", "forward_layer", "gradient", "loss", "ratio", "saturated",
        "scores", "size", "spread",
    }  # fmt: skip
    for name, values in healthy().items():
        assert list(values) == sorted(values)
        assert len(values) >= 30
        assert quantile(name, 0) <= quantile(name, 0.5) <= quantile(name, 1)


class Ending(nn.Module):
    """A linear net that ends in a rectifier of some spelling."""

    def __init__(self, end):
        super().__init__()
        self.hidden, self.out, self.end = nn.Linear(64, 16), nn.Linear(16, 10), end

    def forward(self, x):
        return self.end(self.out(torch.relu(self.hidden(x.flatten(1)))))


@pytest.mark.parametrize(
    "end",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        torch.relu,
        lambda s: nn.functional.relu(s, inplace=True),
        lambda s: s.clamp(min=0),
    ],
    ids=["module", "in place", "relu6", "function", "function in place", "clamp"],
)
def test_scores_before_their_last_rectifier(end):
    torch.manual_seed(0)
    patient = patient_of(Ending(end))
    assert [f.disease for f in rectified(patient, signals(patient))] == ["dying_relu"]
    x = patient.train[0][0]
    with torch.no_grad():
        scores = unrectified(patient).model(x)
        bare = patient.model.out(torch.relu(patient.model.hidden(x.flatten(1))))
        made = patient.model(x)
    assert torch.equal(scores, bare)
    assert not torch.equal(made, bare)


def test_rectified_maps_that_are_averaged_and_hidden_rectifiers_are_left_alone():
    maps = nn.Sequential(nn.Conv2d(1, 10, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # as SqueezeNet ends
    patient = patient_of(maps)
    assert rectified(patient, signals(patient)) == []
    patient = patient_of(mlp())
    assert rectified(patient, signals(patient)) == []
    x = patient.train[0][0]
    assert torch.equal(unrectified(patient).model(x), patient.model(x))

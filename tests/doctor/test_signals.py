"""What one pass shows, beside formulas."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from knep.doctor.model.signal_pass import signals
from knep.doctor.subject import setup as patients
from knep.doctor.subject.setup import Patient
from knep.errors import InputError


def patient_of(model: nn.Module, **changes) -> Patient:
    """Four batches of random images (16, 1, 6, 6) in four classes."""
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(16, 1, 6, 6, generator=g), torch.arange(16) % 4) for _ in range(4)]
    return patients.of(
        model, batches, batches[:1], optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1), num_classes=4, **changes
    )


def plain(*layers: nn.Module, width: int = 36) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 4))


class Functional(nn.Module):
    """Activations as functions and methods, a weight multiplied by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.by_hand = nn.Parameter(torch.randn(288, 4) / 17)

    def forward(self, x):
        x = F.relu(self.conv(x)).clamp(min=0)
        return x.tanh().flatten(1) @ self.by_hand


def test_rows_follow_the_calls():
    seen = signals(patient_of(Functional()))
    assert [row.function for row in seen.layers] == ["conv2d", "relu", "relu", "tanh", "matmul"]
    assert [row.path for row in seen.layers] == ["conv", "model", "model", "model", "model"]
    assert [row.fan_in for row in seen.layers] == [9, 0, 0, 0, 288]
    assert seen.layers[0].units == 8
    assert seen.images == 64


def test_statistics_are_those_of_the_output():
    model = plain()
    patient = patient_of(model)
    row = signals(patient).layers[0]
    out = model(torch.cat([x for x, _ in patient.train])).detach().double()
    assert row.mean == pytest.approx(float(out.mean()), abs=1e-6)
    assert row.size == pytest.approx(float(out.square().mean().sqrt()), rel=1e-5)
    assert row.signal == pytest.approx(float(out.var(0, correction=0).mean().sqrt()), rel=1e-5)
    pairs = F.cosine_similarity(out[:, None], out[None], dim=2)
    assert row.cosine == pytest.approx(float((pairs.sum() - 64) / (64 * 63)), abs=1e-6)
    assert row.scale == pytest.approx(6 * float(model[1].weight.detach().square().mean().sqrt()), rel=1e-5)


def test_gradient_of_the_scores_is_softmax_minus_target():
    model = plain()
    patient = patient_of(model)
    row = signals(patient).layers[0]
    x, y = (torch.cat(parts) for parts in zip(*patient.train, strict=True))
    error = model(x).detach().softmax(1) - F.one_hot(y, 4)
    assert row.flow == pytest.approx(float(error.square().sum(1).mean().sqrt()), rel=1e-5)
    assert row.gradient == pytest.approx(float((error / 64).std(correction=0)), rel=1e-4)


def test_he_init_keeps_size_and_gradient():
    layers = []
    for _ in range(12):
        linear = nn.Linear(256 if layers else 36, 256)
        nn.init.kaiming_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    rows = signals(patient_of(plain(*layers, width=256))).linear[1:-1]
    assert 0.6 < rows[-1].size / rows[0].size < 1.6
    assert 0.6 < rows[0].flow / rows[-1].flow < 1.6


def test_dead_units_and_saturated_numbers():
    half = nn.Linear(36, 36)
    nn.init.zeros_(half.weight)
    half.bias.data = torch.linspace(-1, 1, 36)
    seen = signals(patient_of(plain(half, nn.ReLU(), nn.Linear(36, 36), nn.ReLU6())))
    assert seen.layers[1].dead == 0.5
    assert seen.layers[3].function == "relu6"
    assert seen.layers[3].saturated == 0
    half.bias.data = 4 * torch.linspace(-1, 1, 36)
    seen = signals(patient_of(plain(half, nn.Tanh())))
    flat = (half.bias.tanh().square() > 0.95).float().mean()
    assert seen.layers[1].saturated == pytest.approx(float(flat))
    assert seen.layers[1].spread == pytest.approx(0, abs=1e-6)


def test_nothing_is_changed():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    signals(patient_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_left_out():
    linear = nn.Linear(36, 36)

    class Dropping(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.first, self.p = linear, p

        def forward(self, x):
            return F.dropout(self.first(x.flatten(1)), self.p, self.training)[:, :4]

    without = signals(patient_of(Dropping(0.0)))
    assert signals(patient_of(Dropping(0.9))).scores.std == without.scores.std
    model = nn.Sequential(nn.Flatten(), linear, nn.Dropout(0.9), nn.Linear(36, 4))
    assert signals(patient_of(model)).weights[2].zeros == 0


@pytest.mark.parametrize(
    ("end", "ends", "last"),
    [
        (nn.Identity(), "scores", "linear"),
        (nn.Softmax(1), "probabilities", "softmax"),
        (nn.LogSoftmax(1), "log-probabilities", "log_softmax"),
        (nn.Sigmoid(), "unit interval", "sigmoid"),
    ],
)
def test_ends(end, ends, last):
    scores = signals(patient_of(nn.Sequential(plain(), end))).scores
    assert (scores.ends, scores.last) == (ends, last)
    assert scores.chance == pytest.approx(math.log(4))


def test_weights_without_gradient():
    model = plain(nn.Linear(36, 36))
    model[1].weight.requires_grad_(False)
    rows = {row.name: row for row in signals(patient_of(model)).weights}
    assert rows["1.weight"].gradient is None
    assert not rows["1.weight"].trainable
    assert rows["1.bias"].ratio > 0


def test_half_precision_is_widened():
    model = plain()
    wide = signals(patient_of(model.bfloat16()))
    assert wide.finite
    assert model[1].weight.dtype == torch.bfloat16


def test_images_that_are_not_finite_and_unknown_labels_are_left_out():
    patient = patient_of(plain())
    patient.train[0][0][:8] = math.nan
    patient.train[1][1][:8] = 99
    assert signals(patient).images == 48
    for x, _ in patient.train:
        x[:] = math.nan
    with pytest.raises(InputError, match="only finite"):
        signals(patient)


def test_json_of_what_is_not_finite():
    model = plain()
    nn.init.constant_(model[1].weight, math.inf)
    row = signals(patient_of(model)).as_dict()
    text = json.dumps(row, allow_nan=False)
    assert json.loads(text)["scores"]["loss"] is None


def test_other_outputs_are_named():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain()

        def forward(self, x):
            return self.inner(x), x

    with pytest.raises(InputError, match="gives tuple for 64 images"):
        signals(patient_of(Pair()))
    with pytest.raises(InputError, match=r"linear|Linear"):
        signals(patient_of(nn.Sequential(nn.Flatten(), nn.Linear(7, 4))))

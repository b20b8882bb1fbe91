"""Subjects of every task: each sick one is found and named, and its healthy twin is called healthy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import knep
from knep.doctor.checks.splits import chance_copies
from knep.doctor.findings import diseases
from knep.errors import InputError
from tests.doctor.cases.held_out import HELD_OUT
from tests.doctor.cases.pictures import PICTURES
from tests.doctor.cases.sequences import SEQUENCES
from tests.doctor.cases.tables import TABLES
from tests.doctor.cases.ward import adam, mlp, table

CASES = {build.__name__: (build, rights) for build, rights in {**TABLES, **SEQUENCES, **PICTURES, **HELD_OUT}.items()}
# Trials of several remedies, seconds each; and of the rest, two in three are for the long suite.
LONG = {"tags_of_others", "tagger_that_crawls", "deep_and_flat", "state_behind_the_padding", "masks_of_others"}


TABLE_OF_CASES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LONG or i % 3 else []) for i, name in enumerate(CASES)
]


@pytest.mark.parametrize("name", TABLE_OF_CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sick_subject_is_named_and_its_twin_is_healthy(name):
    build, rights = CASES[name]
    assert set(rights.split()) <= set(diseases())
    found = {f.disease for f in build(fixed=False).examined().findings}
    assert found & set(rights.split()), found
    assert build(fixed=True).examined().findings == ()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(8, 1)

    def forward(self, left, right):
        return self.body(torch.cat([left, right], 1))


def batches(form):
    x, y = table(400)
    y = y[:, None]
    return [form(x[i : i + 40], y[i : i + 40]) for i in range(0, 400, 40)]


@pytest.mark.parametrize(
    ("form", "model"),
    [
        (lambda x, y: (x[:, :4], x[:, 4:], y), Two()),
        (lambda x, y: ((x[:, :4], x[:, 4:]), y), Two()),
        (lambda x, y: {"left": x[:, :4], "right": x[:, 4:], "target": y}, Two()),
        (lambda x, y: {"any": x, "names": ["row"] * len(x), "y": y}, mlp(8, 1)),
        (lambda x, y: [x, y], mlp(8, 1)),
    ],
)
def test_batches_of_any_form_reach_model_and_loss_as_they_are(form, model):
    seen = batches(form)
    report = knep.doctor.examine(model, seen, seen[:3], optimizer=adam(1e-2), loss=nn.MSELoss())
    assert report.measured["task"] == "regression"


def test_a_forward_of_ones_own_reads_what_no_rule_does():
    seen = batches(lambda x, y: {"rows": (x, y)})
    loss = lambda output, target: output[0].sub(output[1]).square().mean()  # noqa: E731
    forward = lambda model, batch: (model(batch["rows"][0]), batch["rows"][1])  # noqa: E731
    report = knep.doctor.examine(
        mlp(8, 1), seen, seen[:3], optimizer=adam(1e-2), loss=loss, forward=forward, task="other"
    )
    assert report.findings == ()


def test_nothing_that_is_given_is_changed():
    x, y = table(400)
    own = torch.Generator().manual_seed(3)
    train = DataLoader(TensorDataset(x, y[:, None]), 40, shuffle=True, generator=own)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), own.get_state()
    knep.doctor.examine(model, train, optimizer=optimizer, loss=nn.MSELoss())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(own.get_state(), states[3])


def test_two_examinations_say_the_same():
    reports = [CASES["raw_columns"][0](fixed=False).examined() for _ in range(2)]
    assert [f.as_dict() for f in reports[0].findings] == [f.as_dict() for f in reports[1].findings]


def test_an_unknown_task_is_one_line():
    x, y = table(100)
    with pytest.raises(InputError, match="task=ranking is none of multiclass, binary"):
        knep.doctor.examine(mlp(8, 1), [(x, y[:, None])], optimizer=adam(1e-2), task="ranking")


def test_chance_copies_are_what_new_draws_repeat():
    few = torch.randint(0, 4, (2000, 4), generator=torch.Generator().manual_seed(0))
    seen = {r.numpy().tobytes() for r in few[:1000]}
    share = sum(r.numpy().tobytes() in seen for r in few[1000:]) / 1000
    assert chance_copies(few[:1000]) == pytest.approx(share, abs=0.03)
    assert chance_copies(torch.randn(200, 4)) == 0


@pytest.mark.parametrize("shape", ["broadcast_shapes", "nan_gradient", "sees_the_future", "repeated_rows"])
def test_each_new_disease_says_what_to_do(shape):
    about = diseases()[shape]
    assert about.mend
    assert about.source

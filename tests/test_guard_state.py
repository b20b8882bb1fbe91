"""The optimizer's state under the guard, and the optimizers whose weights tell of a bad gradient."""

import csv
import signal

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from knep.guard import step_guard
from knep.guard.finite import digest
from knep.guard.optimizer_state import carries, forget_bad_state, state_is_finite
from knep.recipes.optimizer import sam
from tests.exhaustive import guard_matrix, resume_matrix

OPTIMIZERS = {
    "sgd": lambda p, **k: torch.optim.SGD(p, **k),
    "momentum": lambda p, **k: torch.optim.SGD(p, momentum=0.9, weight_decay=0.1, **k),
    "adam": lambda p, **k: torch.optim.Adam(p, **k),
    "adamw": lambda p, **k: torch.optim.AdamW(p, **k),
    "amsgrad": lambda p, **k: torch.optim.Adam(p, amsgrad=True, weight_decay=0.1, **k),
    "nadam": lambda p, **k: torch.optim.NAdam(p, **{n: v for n, v in k.items() if n != "fused"}),
    "rmsprop": lambda p, **k: torch.optim.RMSprop(p, centered=True, **{n: v for n, v in k.items() if n != "fused"}),
    "adagrad": lambda p, **k: torch.optim.Adagrad(p, **k),
}


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rate", [0.0, 0.01])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_tell_of_a_gradient_that_is_not_finite(name, kernel, rate, value):
    weight = nn.Parameter(torch.arange(1.0, 20.0))
    optimizer = OPTIMIZERS[name]([weight], lr=rate, **kernel)
    assert carries(optimizer)
    for i in range(3):
        weight.grad = torch.linspace(-1, 1, 19) * (i + 1)
        optimizer.step()
    assert weight.isfinite().all()
    weight.grad[17] = value
    given = digest([("g", weight.grad)])
    optimizer.step()
    assert torch.equal(~weight.isfinite(), torch.arange(19) == 17)
    assert digest([("g", weight.grad)]) == given


def test_no_other_optimizer_is_taken_at_its_weights_word():
    weight = [nn.Parameter(torch.ones(3))]
    assert not carries(torch.optim.SGD(weight, lr=0.1, momentum=0.9, nesterov=True))  # edits the gradient itself
    assert not carries(torch.optim.Rprop(weight))
    assert not carries(torch.optim.Adadelta(weight))
    assert not carries(sam(weight, lr=0.1, base=torch.optim.SGD))


def test_state_that_is_bad_is_found_and_forgotten_for_its_parameter_alone():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert state_is_finite(model, optimizer)
    optimizer.state[model.bias]["exp_avg_sq"][1] = float("inf")
    assert not state_is_finite(model, optimizer)
    forget_bad_state(optimizer)
    assert list(optimizer.state) == [model.weight]


# The gradient's norm is not measured, which would be infinite too.
LINES = ["optimizer=adamw", "guard=skip", "log_every=1000"]


class Huge(Callback):
    """Adds 1e25 to a layer's gradient in one step: its square is infinite in float32, and its update zero."""

    def __init__(self, batch):
        self._batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        number = trainer.current_epoch * resume_matrix.BATCHES + batch_idx
        pl_module.recipe.regularization.penalty = (
            (lambda params: params[0].sum() * 1e25) if number == self._batch else (lambda params: 0.0)
        )


def interventions(folder):
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return [int(r["step"]) for r in rows if r.get("guard/interventions")]


@pytest.mark.parametrize(("every", "found"), [(50, 13), (4, 11), (1, 9)])
def test_an_update_of_zero_for_ever_is_seen_before_the_epoch_ends(every, found, tmp_path, monkeypatch):
    monkeypatch.setattr(step_guard, "LOOK_EVERY", every)
    resume_matrix.fit(LINES, tmp_path / "run", [Huge(9)])
    assert interventions(tmp_path / "run") == [found]
    assert guard_matrix.bad_checkpoint(tmp_path / "run") is None


def test_it_is_seen_before_a_checkpoint_that_nobody_expected(tmp_path):
    stop = resume_matrix.Strike(11, signal.SIGINT)
    resume_matrix.fit(LINES, tmp_path / "run", [Huge(9), stop])
    assert guard_matrix.bad_checkpoint(tmp_path / "run") is None
    assert interventions(tmp_path / "run") == [11]

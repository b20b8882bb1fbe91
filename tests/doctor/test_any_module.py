"""The doctor beside modules of one's own: any loss, batch and optimization; it changes no number and raises nothing."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import knep.doctor
from knep.doctor.live import any_module
from knep.errors import InputError


def rows(count=480):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=draw)
    return x, (x @ torch.randn(8, 3, generator=draw)).argmax(1)


class Own(L.LightningModule):
    """A net of one's own; how: what is otherwise."""

    def __init__(self, lr=0.05, **how):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))
        self.lr, self.how = lr, how

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Regression(Own):
    """Batches are dicts, the target a column, the loss below zero."""

    def training_step(self, batch, batch_idx):
        return {"loss": (self.net(batch["x"])[:, :1] - batch["y"]).square().mean() - 10, "more": 1}

    def validation_step(self, batch, batch_idx):
        pass


class Manual(Own):
    """Manual optimization, which returns no loss."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if not self.how.get("forgets"):
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


class Adversaries(Own):
    """Two optimizers that take turns, one of which steps on every third batch alone."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.judge = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        (first if batch_idx % 3 == 0 else second).zero_grad()
        loss = self.judge(self.net(batch[0])).mean()
        self.manual_backward(loss if batch_idx % 3 == 0 else -loss)
        (first if batch_idx % 3 == 0 else second).step()
        return loss

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.net, self.judge)]


def fitted(module, doctor=None, batches=None, **how):
    x, y = rows()
    batches = batches or [(x[i : i + 16], y[i : i + 16]) for i in range(0, 480, 16)]
    torch.manual_seed(1)
    trainer = L.Trainer(
        **{"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **how},
        **dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False),
        callbacks=[doctor] if doctor else [],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:4], batch_size=None))
    return module


@pytest.mark.parametrize("make", [Own, Regression, Manual, Adversaries])
def test_a_healthy_module_is_left_alone_to_the_bit(make, capsys):
    x, _ = rows()
    batches = [{"x": x[i : i + 16], "y": x[i : i + 16, :1]} for i in range(0, 480, 16)] if make is Regression else None
    doctor = knep.doctor.callback(every=5)
    watched, plain = fitted(make(), doctor, batches), fitted(make(), None, batches)
    weights = plain.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in watched.state_dict().items())
    assert doctor.findings == []
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("doctor:")]
    assert len(said) == (make is Manual) + (make is Adversaries)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())


def test_a_rate_too_high_is_said_once_and_stops_the_fit(capsys):
    doctor = knep.doctor.callback(on_finding="stop", every=5)
    module = fitted(Own(lr=1e3), doctor, max_epochs=20)
    assert doctor.stopped_by == doctor.findings[0]["disease"]
    assert module.trainer.global_step < 300
    assert capsys.readouterr().out.count("doctor: since step") >= 1


def test_gradients_that_add_up_under_manual_optimization(capsys):
    doctor = knep.doctor.callback(every=5)
    fitted(Manual(forgets=True), doctor)
    assert doctor.findings[0]["disease"] == "gradients_add_up"
    assert doctor.findings[0]["began"] == 1


def test_a_rate_too_low_is_cured():
    doctor = knep.doctor.callback(on_finding="cure", every=5)
    module = fitted(Own(lr=1e-7), doctor, max_epochs=8)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] > 1e-6
    assert doctor.findings[0]["cure"].startswith("learning rate x")


@pytest.mark.parametrize("where", ["step", "validate", "report"])
def test_an_error_of_the_doctor_is_one_line(where, monkeypatch, capsys):
    def wrong(*args, **how):
        raise RuntimeError("of the\ndoctor")

    monkeypatch.setattr(any_module.Watch, where, wrong)
    module = fitted(Own(), knep.doctor.callback(every=5))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("doctor:")]
    assert "the training goes on: RuntimeError: of the\\ndoctor" in line
    assert module.trainer.global_step == 90
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_what_a_layer_gives_may_be_anything(capsys):
    class Odd(nn.Module):
        def forward(self, x):
            return x.mean()

    module = Own()
    module.net = nn.Sequential(nn.Linear(8, 3), nn.ReLU())
    module.odd = Odd()
    module.training_step = lambda batch, batch_idx: (
        F.cross_entropy(module.net(batch[0]), batch[1]) + 0 * module.odd(batch[0])
    )
    fitted(module, knep.doctor.callback(every=3))
    assert "RuntimeError" not in capsys.readouterr().out


def test_micro_batches_count_as_one_step():
    doctor = knep.doctor.callback(every=2)
    module = fitted(Own(), doctor, accumulate_grad_batches=3)
    assert module.trainer.global_step == 30
    assert doctor._watch.steps == 30
    assert doctor.findings == []


def test_what_it_found_goes_on_with_a_checkpoint():
    doctor = knep.doctor.callback(every=5)
    fitted(Manual(forgets=True), doctor)
    again = knep.doctor.callback()
    again.load_state_dict(doctor.state_dict())
    assert [row["disease"] for row in again.findings] == [row["disease"] for row in doctor.findings]


def test_an_unknown_action_is_refused():
    with pytest.raises(InputError, match="on_finding=shout"):
        knep.doctor.callback(on_finding="shout")

"""What only a loop shows, and the step since when: sick loops beside their healthy twins."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

import knep.doctor


def net(out=3):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(body, nn.Linear(32, out))


def batches(count, size=32):
    draw = torch.Generator().manual_seed(1)
    teacher = torch.randn(8, 3, generator=draw)
    for _ in range(count):
        x = torch.randn(size, 8, generator=draw)
        yield x, (x @ teacher).argmax(1)


def loop(hook=lambda *_: None, *, model=None, optimizer=None, schedule=None, steps=100, epoch=20, **how):
    """The watch behind a plain loop; how: what it does otherwise, a function or a flag for each place."""
    model = model or net()
    optimizer = optimizer(model) if optimizer else SGD(model.parameters(), lr=0.03)
    plan = schedule(optimizer) if schedule else None
    with knep.doctor.watch(model, optimizer, on_finding="none", every=5) as d:
        for step, (x, y) in enumerate(batches(steps)):
            if not how.get("keeps"):
                optimizer.zero_grad(set_to_none=not how.get("zeros"))
            loss = how.get("loss", F.cross_entropy)(model(x), y)
            loss.backward()
            hook(step, model, optimizer)
            if not how.get("idle"):
                optimizer.step()
            if plan and (how.get("each_batch") or step % epoch == epoch - 1):
                plan.step(*([loss.detach()] if isinstance(plan, ReduceLROnPlateau) else []))
            d.step(loss, y=y)
            if step % epoch == epoch - 1 and "validates" in how:
                how["validates"](model, d)
    return d


def validated(model, d, leaves=True, evaluates=True):
    model.train(not evaluates)
    with torch.no_grad():
        for x, _ in batches(3):
            model(x)
    d.validate(loss=1.0)
    model.train(leaves)


def a_head_made_anew(model):
    optimizer = SGD(model.parameters(), lr=0.05)
    model[1] = nn.Linear(32, 3)
    return optimizer


def told_too_late(model):
    other = net()
    return lambda scores, y: F.cross_entropy(other(scores.detach() @ torch.ones(3, 8)), y)


def by_hand(scores, y):
    return F.cross_entropy(scores, y).detach().requires_grad_()


def once(scores, y, at, seen=[]):  # noqa: B006
    seen.append(0)
    return F.cross_entropy(scores, y) * (math.nan if len(seen) == at + 1 else 1.0)


def divided(step, model):
    for p in model.parameters():
        p.grad /= 30 + step % 7


def midway(step, model, optimizer):
    if step == 12:
        model.eval()


SICK = {
    "gradients_add_up": (1, {"keeps": True}),
    "gradients_dropped": (0, {"hook": lambda step, model, optimizer: optimizer.zero_grad()}),
    "gradients_dropped, zeros": (0, {"hook": lambda s, model, o: o.zero_grad(set_to_none=False)}),
    "detached_loss": (0, {"loss": by_hand}),
    "detached_loss, of another model": (0, {"loss": told_too_late(None)}),
    "foreign_optimizer": (0, {"optimizer": lambda m: SGD(copy.deepcopy(m).parameters(), lr=0.05)}),
    "no_optimizer_step": (0, {"idle": True, "steps": 260}),
    "cut_off": (0, {"optimizer": a_head_made_anew}),
    "eval_mode_in_training": (20, {"validates": lambda m, d: validated(m, d, leaves=False)}),
    "eval_mode_in_training, midway": (13, {"hook": midway}),
    "train_mode_in_validation": (20, {"validates": lambda m, d: validated(m, d, evaluates=False)}),
    "lr_too_low": (6, {"schedule": lambda o: StepLR(o, 3, 0.1), "each_batch": True}),
    "nan_loss": (50, {"steps": 60, "hook": lambda *_: None, "loss": lambda z, y: once(z, y, 50)}),
    "lr_too_low, a cosine of epochs": (7, {"schedule": lambda o: CosineAnnealingLR(o, 8), "each_batch": True}),
    "lr_too_low, slower than an epoch": (
        *(91, {"schedule": lambda o: ExponentialLR(o, 0.95), "each_batch": True, "steps": 240}),
    ),
    "lr_too_low, exponential": (45, {"schedule": lambda o: ExponentialLR(o, 0.9), "each_batch": True, "steps": 120}),
}
HEALTHY = {
    "plain": {},
    "gradients set to zeros": {"zeros": True},
    "dropped behind the step": {"keeps": True, "validates": None},
    "stepped by epoch": {"schedule": lambda o: StepLR(o, 1, 0.1), "validates": validated},
    "cosine over all steps": {"schedule": lambda o: CosineAnnealingLR(o, 100), "each_batch": True},
    "one cycle, three epochs": {
        "optimizer": lambda m: Adam(m.parameters(), lr=1e-3),
        "schedule": lambda o: OneCycleLR(o, 1e-2, total_steps=60),
        "each_batch": True,
        "steps": 60,
    },
    "cycles": {"schedule": lambda o: CyclicLR(o, 1e-4, 0.1, 10), "each_batch": True},
    "divided by hand": {"optimizer": lambda m: SGD(m.parameters(), lr=0.01), "hook": lambda s, m, o: divided(s, m)},
    "a plateau": {"schedule": lambda o: ReduceLROnPlateau(o, patience=0), "steps": 200, "epoch": 10},
    "validated": {"validates": validated},
    "a part in eval mode": {"hook": lambda step, model, optimizer: model[0][3].eval()},
    "Adam": {"optimizer": lambda m: Adam(m.parameters(), lr=3e-3)},
    "clipped": {"hook": lambda s, model, o: nn.utils.clip_grad_norm_(model.parameters(), 0.5)},
}


@pytest.mark.parametrize("case", SICK)
def test_a_sick_loop_is_named_with_its_step(case):
    began, how = SICK[case]
    finding = loop(**how).report().findings[0]
    assert (finding.disease, finding.began) == (case.partition(",")[0], began), finding
    assert finding.mend


@pytest.mark.parametrize("case", HEALTHY)
def test_its_twin_is_not(case):
    how = dict(HEALTHY[case])
    if case.startswith("dropped"):
        how = {"optimizer": Behind}
    assert loop(**how).report().findings == ()


class Behind(SGD):
    """Drops its gradients itself, behind each step."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.05)

    def step(self, closure=None):
        super().step(closure)
        super().zero_grad()

    def zero_grad(self, set_to_none=True):
        pass


def test_gradients_of_micro_batches_are_meant_to_add_up():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    with knep.doctor.watch(model, optimizer, on_finding="none", every=2) as d:
        for step, (x, y) in enumerate(batches(160)):
            loss = F.cross_entropy(model(x), y)
            (loss / 4).backward()
            if step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
                d.step(loss)
    assert d.report().findings == ()
    assert d.loop is not None
    assert not any(d.loop.added.values())


def test_how_far_a_rate_fell_is_said():
    how = SICK["lr_too_low"][1]
    text = loop(**how).report().findings[0].evidence
    assert "fell 1e+04 times, from 0.03 to 3.0e-06, within 12 steps" in text


@pytest.mark.parametrize("targets", [torch.randn(32, 1), {"boxes": [torch.ones(2)]}, None, torch.ones(32, 4, 4)])
def test_targets_of_any_kind_are_left_alone(targets):
    model = net(1)
    optimizer = Adam(model.parameters(), lr=1e-3)
    with knep.doctor.watch(model, optimizer, on_finding="none", every=2) as d:
        for x, _ in batches(40):
            optimizer.zero_grad()
            scores = model(x)
            loss = (scores - x[:, :1]).square().mean()
            loss.backward()
            optimizer.step()
            d.step(loss, y=targets, scores={"out": scores})
    assert d.report().findings == ()


def test_a_loss_below_zero_may_fall():
    """The likelihood of a density: from 1.4 to below -1, which is no divergence."""
    mean, spread = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    model = nn.ParameterList([mean, spread])
    optimizer = Adam(model.parameters(), lr=0.02)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * 0.05
    with knep.doctor.watch(model, optimizer, on_finding="none") as d:
        for _ in range(300):
            optimizer.zero_grad()
            loss = (spread + 0.5 * ((x - mean) / spread.exp()) ** 2).mean()
            loss.backward()
            optimizer.step()
            d.step(loss)
    assert loss.item() < -1
    assert d.report().findings == ()


def test_without_a_loss_the_rest_is_seen():
    model = net()
    with knep.doctor.watch(model, SGD(copy.deepcopy(model).parameters(), lr=0.05), on_finding="none") as d:
        for x, y in batches(30):
            F.cross_entropy(model(x), y).backward()
            d._optimizer.step()
            d.step(None)
    assert d.report().findings[0].disease == "foreign_optimizer"
    assert d.report().measured["trial"]["losses"] == []

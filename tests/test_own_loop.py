"""Averages and stopping by name, against the callbacks' formulas."""

import copy

import pytest
import torch
from torch import nn

import knep
from knep.errors import InputError


def walk(recipe, steps=12, **how):
    """A loop in which the weights are drawn anew each step, and what they were."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.BatchNorm1d(4, dtype=torch.float64))
    average = recipe.average(model, **how)
    seen = []
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        seen.append(copy.deepcopy(model[0].weight.detach()))
        average.update(score=abs(step - 4))
    return model, average, seen


def test_ema_is_the_recursion():
    model, average, seen = walk(knep.load("none", ["averaging=ema", "averaging.decay=0.7"]))
    wanted = seen[0]
    for n, weights in enumerate(seen[1:], 1):
        d = min(0.7, (1 + n) / (10 + n))
        wanted = d * wanted + (1 - d) * weights
    own = seen[-1]
    with average.swapped():
        torch.testing.assert_close(model[0].weight, wanted)
    assert torch.equal(model[0].weight, own)


def test_swa_is_the_mean_of_the_end():
    model, average, seen = walk(knep.load("none", ["averaging=swa", "averaging.start=0.75"]), updates=12)
    with average.swapped():
        torch.testing.assert_close(model[0].weight, torch.stack(seen[9:]).mean(0))


def test_soup_is_the_mean_of_the_best_and_asks_for_scores():
    recipe = knep.load("none", ["averaging=soup", "averaging.k=3"])
    model, average, seen = walk(recipe)
    with average.swapped():
        torch.testing.assert_close(model[0].weight, torch.stack(seen[3:6]).mean(0))
    with pytest.raises(InputError, match=r"average.update\(score\)"):
        average.update()


def test_none_changes_nothing_and_an_ensemble_is_refused():
    model, average, seen = walk(knep.load("none"))
    with average.swapped() as inside:
        assert torch.equal(inside[0].weight, seen[-1])
    with pytest.raises(InputError, match="once for each"):
        knep.load("none", ["averaging=ensemble"]).average(model)


def test_statistics_of_the_average_are_estimated_and_put_back():
    model, average, _ = walk(knep.load("none", ["averaging=ema"]))
    x = torch.randn(32, 3, dtype=torch.float64)
    model(x)
    before = model[1].running_mean.clone()
    with average.swapped([x[:16], x[16:]]):
        wanted = torch.stack([model[0](half).mean(0) for half in (x[:16], x[16:])]).mean(0)
        torch.testing.assert_close(model[1].running_mean, wanted.detach())
    assert torch.equal(model[1].running_mean, before)


def test_the_average_is_put_back_where_the_evaluation_fails():
    model, average, seen = walk(knep.load("none", ["averaging=ema"]))
    with pytest.raises(ZeroDivisionError), average.swapped():
        raise ZeroDivisionError
    assert torch.equal(model[0].weight, seen[-1])


def test_an_average_goes_on_from_its_state():
    recipe = knep.load("none", ["averaging=ema", "averaging.decay=0.7"])
    model, average, _ = walk(recipe)
    again = recipe.average(model)
    again.load_state_dict(average.state_dict())
    for one in (average, again):
        one.update()
    with average.swapped():
        left = model[0].weight.detach().clone()
    with again.swapped():
        assert torch.equal(model[0].weight, left)


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_a_stopper_waits_as_early_stopping_does(mode, sign):
    lines = ["stopping=early", "stopping.patience=2", "stopping.min_delta=0.1", f"stopping.mode={mode}"]
    monitor = "val_loss" if mode == "min" else "val_acc"
    stopper = knep.load("none", [*lines, f"stopping.monitor={monitor}"]).stopper()
    assert [stopper.update(sign * m) for m in (3.0, 2.0, 1.95, 1.0, float("nan"), 0.95)] == [False] * 5 + [True]
    assert (stopper.best, stopper.improved) == (sign * 1.0, False)
    assert not any(knep.load("none").stopper().update(1.0) for _ in range(100))

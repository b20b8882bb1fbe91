"""`knep lr`: the range test, the trials around what it suggests, and what is said of them."""

import math

import pytest
import torch
from lightning.pytorch import Callback

from knep.config.compose import compose_config
from knep.errors import InputError
from knep.evidence.rate import command
from knep.evidence.rate.find import Found, agreed, climb, find, rates, refined, suggestions
from knep.evidence.rate.range_test import DOWN, Curve, range_test
from knep.evidence.rate.short_run import Problem
from knep.optim.schedules import rising
from knep.recipes import scheduler

SMALL = ["data=digits", "model=mlp", "model.widths=[16]", "recipe=none", "scaling=unit", "threads=1", "progress=false"]


def problem(*lines):
    return Problem.of(compose_config([*SMALL, *lines]).config)


def valley(lowest=1e-2, steep=2.0):
    """A loss that falls from 2.5 to 0.5 around lowest / 10, and rises behind `lowest`."""
    grid = [1e-6 * 10 ** (i / 12) for i in range(84)]
    fall = [2 / (1 + (rate / (lowest / 10)) ** steep) for rate in grid]
    return Curve(grid, [f + 0.5 + (rate / (10 * lowest)) ** 2 for f, rate in zip(fall, grid, strict=True)])


def test_the_running_mean_starts_at_the_first_loss():
    assert Curve([1, 2, 3], [4.0, 4.0, 4.0]).smooth == pytest.approx([4, 4, 4])
    assert Curve([1, 2], [1.0, 2.0]).smooth[1] == pytest.approx((0.9 * 1 + 2) / 1.9)


def test_a_suggestion_lies_before_the_lowest_loss():
    (found,) = suggestions([valley()])
    assert 1e-3 / 3 < found < 1e-2


def test_seeds_that_disagree_suggest_nothing():
    assert agreed([valley(1e-2), valley(1.2e-2), valley(9e-3)])
    assert agreed([valley(1e-2), valley(1e-1)]) is None


def test_a_loss_that_never_falls_suggests_nothing():
    flat = Curve([1e-3 * 1.1**i for i in range(50)], [2.3] * 50)
    assert flat.lowest is None
    assert flat.steepest is None
    assert agreed([flat, flat]) is None
    assert agreed([]) is None


def test_rates_rise_by_one_factor():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = rising(optimizer, total_steps=9, steps_per_epoch=3, factor=2.0)
    seen = []
    for _ in range(3):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == [0.5, 1.0, 2.0]
    assert not hasattr(scheduler, "rising")  # no option of a run


@pytest.mark.parametrize("start", [1e-4, 1e-2, 3.0])
def test_climbing_reaches_the_valley_from_both_sides(start):
    def loss(rate):
        return (math.log10(rate) + 2) ** 2

    assert 10**-2.3 < climb(loss, start, 10**0.5, 12) < 10**-1.7


def test_a_parabola_finds_its_own_lowest_point():
    low = 0.013
    tried = {
        0.01 * 10 ** (k / 4): [math.exp(math.log(rate / low) ** 2)]
        for k in range(-3, 4)
        for rate in [0.01 * 10 ** (k / 4)]
    }
    assert refined(tried, 0.01) == pytest.approx(low, rel=1e-6)
    bent = {rate: [1 / (1 + abs(math.log(rate / 0.01)))] for rate in tried}  # bends the other way: nothing to find
    assert refined(bent, 0.01) == 0.01


def test_both_rates_of_muon_are_scaled_together():
    config = {"optimizer": {"lr": 0.02, "adamw_lr": 0.002, "ns_steps": 5}}
    assert rates(config, 0.5) == {"optimizer.lr": 0.01, "optimizer.adamw_lr": 0.001}


def test_a_range_test_sees_the_loss_fall_and_diverge():
    run = problem("optimizer=sgd")
    curve = range_test(run, rates(run.config, DOWN), 0.1, seed=0)
    assert curve.rates[0] == pytest.approx(1e-5)
    assert curve.smooth[-1] > curve.smooth[0] > min(curve.smooth)  # it went on until the loss rose
    assert curve.steepest is not None
    assert curve.steepest < curve.lowest
    assert curve.losses == range_test(run, rates(run.config, DOWN), 0.1, seed=0).losses


def test_a_rate_far_too_low_is_found_and_said(tmp_path, capsys):
    out = tmp_path / "seen.png"
    found = command.lr([*SMALL, "optimizer=sgd", "optimizer.lr=1e-4", "trainer.max_epochs=3"], seeds=2, out=out)
    assert found.rate > 1e-2
    said = capsys.readouterr().out
    assert "write optimizer.lr=" in said
    assert "0.0001; difference -" in said
    assert out.read_bytes().startswith(b"\x89PNG")


def test_auto_becomes_a_number(capsys):
    lines = [*SMALL, "optimizer=sgd", "optimizer.lr=auto", "trainer.max_epochs=1"]
    made = command.resolved(lines)
    assert made[:-1] == lines[:-2] + lines[-1:]
    assert float(made[-1].removeprefix("optimizer.lr=")) > 0
    assert "lr: range test, seed 0" in capsys.readouterr().out
    assert command.resolved(SMALL) == SMALL


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["trainer.members=2"], "leave out averaging=ensemble"),
        (["trainer=ddp_sim"], "trainer.devices=1"),
        (["data.micro=auto"], "write a number instead"),
    ],
)
def test_what_has_no_single_rate_is_refused(lines, said):
    with pytest.raises(InputError, match=said):
        problem(*lines)


def test_one_seed_or_no_picture_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least 2"):
        command.lr(SMALL, seeds=1)
    with pytest.raises(InputError, match=r"ends in \.png"):
        command.lr(SMALL, out=tmp_path / "rates.txt")


def test_rates_that_all_diverge_are_refused(monkeypatch):
    monkeypatch.setattr("knep.evidence.rate.find.trial", lambda *_: math.inf)
    monkeypatch.setattr("knep.evidence.rate.find.range_test", lambda *_: Curve([], []))
    with pytest.raises(InputError, match="knep doctor"):
        find(problem("optimizer=sgd"))


def test_a_default_that_is_best_is_kept():
    found = Found(0.1, [], None, 100, {0.1: [1.0, 1.1], 0.3: [2.0, 2.1], 0.03: [1.5, 1.6]}, suggestion=0.11)
    assert found.rate == 0.1
    assert "keep the default" in command.verdict(found, {"optimizer": {"lr": 0.1}})[0]


def test_no_memory_is_no_rate_that_diverges(monkeypatch):
    from knep.engine.step import Step
    from knep.errors import RunFailed

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Step, "loss", full)
    with pytest.raises(RunFailed, match="out of memory in step 0"):
        find(problem("optimizer=sgd"))


def test_a_trial_in_parts_takes_as_many_steps(monkeypatch):
    seen = []

    class Steps(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(trainer.global_step)

    for more in ([], ["data.micro=16"]):
        problem("optimizer=sgd", *more).fit({}, 7, 0, Steps())
    assert seen == [7, 7]

"""Batches that grow: `accumulate={0: 1, 1: 4}` steps as its plan says, at the rate of its law."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from knep.config.compose import compose_config
from knep.config.instantiate import instantiate
from knep.engine.fit import fit_member
from knep.errors import InputError
from knep.utils.batch_plan import at_epoch, length_of, plan_of

QUICK = ["model=mlp", "data.batch_size=128", "trainer.max_epochs=3", "progress=false", "trainer=cpu"]


class Rates(Callback):
    """The rate of every optimizer step, and the epoch that it was made in."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append((trainer.current_epoch, optimizer.param_groups[0]["lr"]))


def rates(folder, *lines):
    run = compose_config([*QUICK, *lines]).run
    data = instantiate(run.data)
    data.prepare()
    seen = Rates()
    member = fit_member(run, data, folder, run.seed, callbacks=[seen])
    return seen.seen, member, data.train_batches


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("lean", ["true", "false"])
def test_steps_and_rates_follow_the_plan(rule, lean, tmp_path):
    seen, member, batches = rates(
        tmp_path, f"optimizer={rule}", "optimizer.lr=0.01", "optimizer.lr_per=64", "scheduler=cosine",
        "scheduler.warmup=0", "accumulate={0:1,1:2,2:4}", f"lean={lean}",
    )  # fmt: skip
    plan = {0: 1, 1: 2, 2: 4}
    each = [math.ceil(batches / n) for n in plan.values()]
    assert [epoch for epoch, _ in seen] == [e for e, n in enumerate(each) for _ in range(n)]
    assert member.steps == sum(each)
    power = 1.0 if rule == "sgd" else 0.5
    for step, (epoch, rate) in enumerate(seen):
        base = 0.01 * (2 * plan[epoch]) ** power
        assert rate == pytest.approx(base * (1 + math.cos(math.pi * step / len(seen))) / 2, rel=1e-6, abs=1e-9)


def test_without_lr_per_the_rate_stays(tmp_path):
    seen, _, _ = rates(tmp_path, "optimizer.lr=0.01", "scheduler=none", "accumulate={1:4}")
    assert {rate for _, rate in seen} == {0.01}


def test_a_grown_batch_is_the_mean_of_its_rows(tmp_path):
    """An epoch of windows of 4 is the same training as batches four times as large."""
    lines = ["optimizer=sgd", "optimizer.lr=0.1", "scheduler=none", "trainer.max_epochs=2", "augment=none"]
    lines += ["trainer.precision=32-true", "dropout=none", "norm=none"]
    _, grown, _ = rates(tmp_path / "a", *lines, "accumulate={0:4,1:4}")
    _, plain, _ = rates(tmp_path / "b", *lines, "accumulate=4")
    for a, b in zip(grown.module.model.parameters(), plain.module.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [
        (3, -1, (10 + 5 + 3, 3)),
        (9, 12, (12, 1 + 2 / 5)),
        (-1, 15, (15, 2)),
        (-1, 21, (21, 4)),
        (2, 99, (15, 2)),
        (-1, -1, (math.inf, math.inf)),
    ],
)
def test_the_length_of_a_run_follows_the_plan(epochs, steps, expected):
    """Of 10 batches an epoch: what schedules, weight averaging and the progress bar count by."""
    plan = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    trainer = L.Trainer(
        max_epochs=epochs,
        max_steps=steps,
        callbacks=[plan],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit_loop.setup_data = lambda: None
    trainer.fit_loop.max_batches = 10
    assert length_of(trainer) == expected


def test_an_average_begins_in_a_run_whose_steps_become_fewer(tmp_path):
    lines = ["averaging=swa", "averaging.start=0.75", "trainer.max_epochs=2", "accumulate={0:1,1:4}"]
    _, member, batches = rates(tmp_path, *lines)
    assert member.steps == batches + math.ceil(batches / 4)
    assert int(member.module.recipe.averaging._average_model.n_averaged) > 0


@pytest.mark.parametrize("wrong", [0, True, 1.5, "2x", {}, {-1: 2}, {0: 0}, {"a": 1}, {0: True}, [1, 2]])
def test_what_is_no_plan_is_refused(wrong):
    with pytest.raises(InputError, match="accumulate="):
        plan_of(wrong)


def test_stored_keys_are_text():
    plan = plan_of({"0": 2, "5": 4})
    assert [at_epoch(plan, epoch) for epoch in (0, 4, 5, 99)] == [2, 2, 4, 4]


def test_a_schedule_by_epochs_is_refused(tmp_path):
    with pytest.raises(InputError, match="accumulate"):
        rates(tmp_path, "scheduler=exponential", "accumulate={0:1,1:2}")


def test_an_epoch_that_the_run_never_reaches_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"epoch 2, which trainer\.max_epochs=2 never reaches"):
        rates(tmp_path, "trainer.max_epochs=2", "accumulate={0:1,2:4}")

"""What is changed on resume is applied and named, or refused; nothing is left out in silence."""

import csv
import math
import shutil

import pytest
import torch

from knep.cli.train import main
from knep.config.compose import compose_config
from knep.config.diff import changes
from knep.errors import InputError
from tests.exhaustive import resume_matrix as matrix

# Epochs of 7 batches, at a rate that never moves by itself.
BASE = [*matrix.BASE, "optimizer=momentum", "scheduler=none", "trainer.max_epochs=2"]


def rates(folder):
    return [float(r["lr"]) for r in csv.DictReader((folder / "metrics.csv").open()) if r["lr"]]


def state(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of two epochs, to be copied."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    main([*BASE, f"hydra.run.dir={folder}"])
    return folder


@pytest.fixture
def run(plain, tmp_path, capsys):
    """A run of two epochs, and the function that resumes it with changes and returns what is said."""
    folder = tmp_path / "run"

    def go_on(*changed, first=()):
        if first:
            main([*BASE, *first, f"hydra.run.dir={folder}"])
        else:
            shutil.copytree(plain, folder)
        capsys.readouterr()
        main([f"ckpt={folder}", "trainer.max_epochs=4", *changed])
        return folder, capsys.readouterr().out

    return go_on


def test_a_rate_is_applied_and_named(run):
    folder, said = run("optimizer.lr=0.01", "optimizer.momentum=0.5")
    assert "optimizer.lr: 0.003 -> 0.01, optimizer.momentum: 0.9 -> 0.5" in said
    assert "trainer.max_epochs: 2 -> 4" in said
    assert "applied from step 14\n" in said
    assert rates(folder) == pytest.approx([0.003] * 14 + [0.01] * 14)
    group = state(folder)["optimizer_states"][0]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 5e-4)


def test_nothing_changed_says_nothing(run):
    _, said = run("progress=false", "checkpoint.every=50", "trainer.max_epochs=2")
    assert "applied" not in said


def test_a_longer_run_takes_the_schedule_of_its_new_length(run):
    folder, said = run(first=["scheduler=cosine", "scheduler.warmup=0"])
    assert "trainer.max_epochs: 2 -> 4, applied from step 14, on the schedule of the new length" in said
    at = [0.003 * (1 + math.cos(math.pi * s / 28)) / 2 for s in range(14, 28)]
    assert rates(folder)[14:] == pytest.approx(at, abs=1e-9)


def test_schedule_and_rate_together(run):
    folder, said = run("optimizer.lr=0.03", "scheduler.gamma=0.5", first=["scheduler=exponential"])
    assert "scheduler.gamma: 0.98 -> 0.5" in said
    assert rates(folder)[14:] == pytest.approx([0.03 * 0.5**2] * 7 + [0.03 * 0.5**3] * 7)


def test_each_layer_keeps_its_share_of_the_rate(run):
    folder, _ = run("optimizer.lr=0.03", first=["layer_decay=0.5"])
    groups = state(folder)["optimizer_states"][0]["param_groups"]
    assert len({g["lr"] for g in groups}) > 1
    assert {round(math.log2(0.03 / g["lr"]), 6) % 1 for g in groups} == {0}


def test_patience(run):
    folder, said = run("stopping.patience=30", first=["stopping=early"])
    assert "stopping.patience: 10 -> 30" in said
    kept = [c["patience"] for c in state(folder)["callbacks"].values() if "patience" in c]
    assert kept == [30]


def test_what_cannot_change_is_refused_and_the_run_stays_as_it_was(plain, tmp_path, capsys):
    folder = shutil.copytree(plain, tmp_path / "run")
    capsys.readouterr()
    names = ("config.yaml", "overrides.txt", "summary.json", "metrics.csv")
    before = {name: (folder / name).read_text() for name in names}
    said = refused(capsys, f"ckpt={folder}", "data.batch_size=30")
    assert "data.batch_size: 15 -> 30 cannot change after 14 steps" in said
    assert "seed: 0 -> 1 cannot change" in refused(capsys, f"ckpt={folder}", "seed=1")
    assert "trainer.max_epochs: 2 -> 1, but this run has 2" in refused(capsys, f"ckpt={folder}", "trainer.max_epochs=1")
    assert before == {name: (folder / name).read_text() for name in names}
    main([f"ckpt={folder}", "trainer.max_epochs=3"])  # the refused values are forgotten


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("model.widths=[8,8]", "model.widths"),
        ("norm=batch", "norm._target_"),
        ("optimizer=adamw", "optimizer"),
        ("optimizer.fused=false", "optimizer.fused"),
        ("+optimizer.dampening=0.1", "optimizer.dampening"),
        ("scheduler=linear", "scheduler._target_"),
        ("averaging=ema", "averaging"),
        ("stopping=early", "stopping"),
        ("accumulate=2", "accumulate"),
        ("data.val_share=0.2", "data.val_share"),
        ("data.split_seed=5", "data.split_seed"),
        ("layer_decay=0.5", "layer_decay"),
        ("trainer.devices=2", "trainer.devices"),
    ],
)
def test_refused(line, key):
    before, now = compose_config(BASE).config, compose_config([*BASE, line]).config
    with pytest.raises(InputError, match=f"^{key}"):
        changes(before, now, 14, 2)


def test_a_schedule_that_keeps_rates_in_its_state_is_refused():
    before = compose_config([*BASE, "scheduler=plateau"]).config
    for line in ("optimizer.lr=0.1", "scheduler.patience=9"):
        with pytest.raises(InputError, match="cannot change"):
            changes(before, compose_config([*BASE, "scheduler=plateau", line]).config, 14, 2)


def test_a_section_that_the_earlier_run_did_not_know_is_no_change():
    now = compose_config(BASE).config
    before = {k: v for k, v in now.items() if k != "lean"} | {"name": "x"}
    assert changes(before, now, 14, 2) == []


def test_a_strangers_values_say_nothing_to_the_terminal():
    now = compose_config(BASE).config
    with pytest.raises(InputError) as told:
        changes(now | {"seed": "\x1b[2J"}, now, 14, 2)
    assert "\x1b" not in str(told.value)

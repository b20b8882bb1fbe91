"""The doctor beside runs of every kind: it sees what it should, and not a bit of the run is another."""

import functools
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from knep.config.compose import compose_config
from knep.doctor.findings import Finding
from knep.doctor.live.callback import Doctor
from knep.doctor.live.fixes import again
from knep.doctor.live.watch import following
from knep.engine.step import Step
from knep.recipes import augment, clip
from knep.recipes.regularization import Regularizer
from knep.run.run import run
from knep.tasks.classification import Classification
from tests.doctor.test_live import LINES, digits, knep_run, mlp, trained  # noqa: F401  (a fixture)

MODES = {
    "accumulate": ["accumulate=2"],
    "sam": ["optimizer=sam"],
    "ema": ["averaging=ema", "averaging.decay=0.9"],
    "lightning's loop": ["lean=false"],
    "schedule_free": ["optimizer=schedule_free"],
    "rollback": ["guard=rollback", "checkpoint.every=10"],
    "clipped": ["clip=norm", "clip.theta=0.5"],
}
QUICK = ["data.limit=400", "trainer.max_epochs=2"]


@pytest.mark.parametrize("mode", MODES)
def test_no_bit_of_a_run_changes(mode, tmp_path):
    summary, weights = knep_run(tmp_path / "with", *QUICK, *MODES[mode], "callbacks=doctor", "doctor.every=3")
    _, same = knep_run(tmp_path / "without", *QUICK, *MODES[mode])
    assert summary["findings"] == []
    assert all(torch.equal(weights[k], same[k]) for k in same)


@pytest.mark.parametrize("mode", ["accumulate", "sam", "lightning's loop"])
def test_a_clip_that_throttles_is_measured_where_a_step_has_several_passes(mode, tmp_path):
    lines = ["clip=norm", "clip.theta=1e-3", "optimizer.lr=0.01", "callbacks=doctor", "doctor.every=4"]
    summary, _ = knep_run(tmp_path, *MODES[mode], *lines)
    assert "clip_throttles" in [row["disease"] for row in summary["findings"]]


def test_each_run_of_several_seeds_is_watched(tmp_path):
    lines = [*LINES, "trainer.max_epochs=3", "scaling=unit", "optimizer=sgd", "optimizer.lr=1e-6"]
    lines += ["callbacks=doctor", "doctor.every=10"]
    for name, more in {
        "seeds": ["trainer.members=2"],
        "ensemble": ["averaging=ensemble", "averaging.members=2"],
    }.items():
        made = compose_config([*lines, *more])
        run(made.config, tmp_path / name, made.choices, made.overrides)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert [row["disease"] for row in summary["findings"]].count("lr_too_low") == 2, name


def in_place(model):
    model.compile(backend="eager")
    return model


COMPILED = {
    "in place": (in_place, "torch.compile makes one graph"),
    "wrapped": (lambda model: torch.compile(model, backend="eager"), "torch.compile makes one graph"),
    "a part": (lambda model: nn.Sequential(in_place(model[:4]), *model[4:]), ""),
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_keeps_its_graph_and_its_bits(how, digits):  # noqa: F811
    kept, note = [], COMPILED[how][1]
    for watched in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        weights, d = trained(COMPILED[how][0](mlp()), digits, watched)
        kept.append((weights, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
        assert not torch._dynamo.utils.counters["graph_break"]
    assert all(torch.equal(a, b) for a, b in zip(kept[0][0], kept[1][0], strict=True))
    assert kept[0][1] == kept[1][1] > 0
    assert all(look.update > 0 and look.grad_norm > 0 for look in d.stream.looks)
    assert [n for n in d.report().notes if note in n] == list(d.report().notes)
    assert len(d.report().notes) == bool(note)


def test_a_compiled_run_is_watched_from_its_door(tmp_path, capsys, monkeypatch):
    eager = functools.partialmethod(nn.Module.compile, backend="eager")  # the graph without the wait for its kernels
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: eager.__get__(self)())
    lines = [*QUICK, "compile=true"]
    summary, weights = knep_run(tmp_path / "with", *lines, "callbacks=doctor", "doctor.every=5")
    _, same = knep_run(tmp_path / "without", *lines)
    assert all(torch.equal(weights[k], same[k]) for k in same)
    assert summary["findings"] == []
    assert capsys.readouterr().out.count("doctor: the model is compiled to one graph") == 1


def two_processes(rank, told):
    """A trainer of one of two processes, whose broadcast hands on what the first one says."""

    def broadcast(orders):
        if rank == 0:
            told[:] = list(orders)
        return list(told)

    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-6}])
    return SimpleNamespace(
        global_step=8,
        world_size=2,
        is_global_zero=rank == 0,
        should_stop=False,
        loggers=[],
        strategy=SimpleNamespace(broadcast=broadcast),
        optimizers=[optimizer],
        lr_scheduler_configs=[],
        progress_bar_callback=None,
    )


@pytest.mark.parametrize("what", ["stop", "cure"])
def test_all_processes_do_what_the_first_one_finds(what, capsys):
    finding, told, done = Finding("lr_too_low", "slow", 0.7, overrides=(("optimizer.lr=0.001",),)), [], []
    for rank in (0, 1):
        doctor = Doctor(on_finding=what, every=8)
        doctor.together = True
        trainer = two_processes(rank, told)
        if rank == 0:
            doctor._order(finding)
        assert not trainer.should_stop  # not before all know of it
        doctor.agree(trainer, None)
        done.append((trainer.should_stop, trainer.optimizers[0].param_groups[0]["lr"], doctor.stopped_by))
    assert done[0] == done[1]
    assert done[0] == ((True, 1e-6, "lr_too_low") if what == "stop" else (False, pytest.approx(1e-3), None))
    assert capsys.readouterr().out.count("doctor: ") == 1


def test_clipping_that_a_cure_changed_is_changed_in_a_run_that_goes_on():
    plain = {"augment": augment.none(), "regularization": Regularizer()}
    tight = functools.partial(clip.norm, theta=1e-3)
    step = Step(torch.sin, nn.Linear(1, 1), Classification(1), clip=tight, **plain)
    module = SimpleNamespace(step=step)
    again(module, None, {"clip_throttles": "clipping off", "lr_too_low": "learning rate x 10"})
    assert (step._clip, step.clips) == (clip.none, False)
    again(module, None, {"loss_spikes": "clipping to norm 1"})
    assert step.clips
    assert step._clip.keywords == {"theta": 1.0}


def test_looks_of_a_long_run_are_further_apart_and_its_last_ones_not_too_far():
    steps = [0]
    while steps[-1] < 100_000:
        steps.append(following(steps[-1], 200))
    apart = [b - a for a, b in itertools.pairwise(steps)]
    assert apart[steps.index(200) : steps.index(3200)] == [200] * 15
    assert max(apart) == 2000
    assert len(steps) < 120


def test_a_rate_far_too_high_is_prescribed_by_how_far_its_first_steps_went(digits):  # noqa: F811
    model = mlp()
    _, d = trained(model, digits, True, torch.optim.Adam(model.parameters(), lr=10.0), steps=60)
    finding = next(f for f in d.report().findings if f.disease == "lr_too_high")
    rate = float(finding.overrides[0][0].removeprefix("optimizer.lr="))
    assert 1e-4 <= rate <= 1e-2

"""Fair comparison: the same budget for every arm, points that come again, the edges of a space, the profile."""

import json
import math
import os

import pytest
import yaml

from knep.cli import main
from knep.config.catalog import CONF, options
from knep.config.compose import Composed, compose_config
from knep.evidence import compare
from knep.evidence.arms import choices
from knep.evidence.trials import Store, Trial, run_trials
from knep.evidence.tuning import Point, Range, edges, search, space

BASE = ("recipe=none", "data=digits", "model=mlp")


def bowl(trial):
    """A record whose validation accuracy is best at a rate of 0.01."""
    acc = 0.95 - 0.1 * abs(math.log10(trial.made.config["optimizer"]["lr"] / 0.01))
    test = {"test/acc": acc + 0.001 * trial.seed, "sealed": 1} if trial.tested else {"sealed": 0}
    curve = [{"step": 10, "val/acc": acc / 2}, {"step": 20, "val/acc": acc}]
    return {"status": "finished", "val/acc": acc, "classes": 10, "cpu_seconds": 1.0, "peak_mib": 1.0, "curve": curve,
            "overrides": trial.made.overrides, "arm": trial.arm, "seed": trial.seed} | test  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    """Trials that are not run: what was asked for, as a list."""
    asked = []

    def run(trials, store, processes=1):
        asked.extend(trials)
        return {t.key: bowl(t) for t in trials}

    monkeypatch.setattr(compare, "run", run)
    return asked


@pytest.mark.parametrize("sampler", ["qmc", "tpe", "random"])
def test_every_arm_gets_the_same_budget_and_the_same_points_come_again(sampler):
    arms = choices("optimizer", ["sgd", "adam"], BASE, "sgd")
    ran = []
    run = lambda trials: ran.extend(trials) or {t.key: bowl(t) for t in trials}  # noqa: E731
    first = search(arms, 5, sampler, run)
    assert search(arms, 5, sampler, run) == first
    assert {name: len(points) for name, points in first.items()} == {"sgd": 5, "adam": 5}
    assert [t.key for t in ran[:10]] == [t.key for t in ran[10:]]
    assert len({t.key for t in ran}) == 10
    assert all(not t.tested and t.seed == 0 for t in ran)
    for name, points in first.items():
        ranges = space(compose_config([*BASE, f"optimizer={name}"]))
        assert all(set(p.values) == set(ranges) for p in points)
        assert all(0 <= ranges[k].share(v) <= 1 for p in points for k, v in p.values.items())


def test_quasi_random_points_fill_the_space_evenly():
    arms = choices("optimizer", ["sgd"], BASE, "sgd")
    (points,) = search(arms, 8, "qmc", lambda trials: {t.key: bowl(t) for t in trials}).values()
    ranges = space(compose_config([*BASE, "optimizer=sgd"]))
    shares = sorted(ranges["optimizer.lr"].share(p.values["optimizer.lr"]) for p in points[1:])
    assert max(b - a for a, b in zip([0, *shares], [*shares, 1], strict=True)) < 0.4


def test_every_rule_that_learns_has_a_space_and_none_has_not():
    for rule in options("optimizer"):
        if rule != "none":
            node = yaml.safe_load((CONF / "optimizer" / f"{rule}.yaml").read_text())
            ranges = space(Composed({"optimizer": node, "scheduler": {}}, {"optimizer": rule}, []))
            assert {"optimizer.lr", "optimizer.weight_decay"} <= set(ranges)
            assert 0 < ranges["optimizer.lr"].share(node["lr"]) < 1, rule  # the option's own rate lies inside
    assert "scheduler.warmup" in space(compose_config([*BASE, "optimizer=adam", "scheduler=cosine"]))
    assert space(compose_config([*BASE, "optimizer=schedule_free"]))["optimizer.warmup_steps"].whole


def test_a_best_point_at_the_edge_is_said():
    ranges = {"optimizer.lr": Range(0.001, 1.0, log=True), "optimizer.weight_decay": Range(1e-6, 1e-2, log=True)}
    inside = Point({"optimizer.lr": 0.03, "optimizer.weight_decay": 1e-4}, 0.9)
    assert edges(inside, ranges) == []
    outside = Point({"optimizer.lr": 0.99, "optimizer.weight_decay": 1.1e-6}, 0.9)
    assert [("high" in s, "low" in s) for s in edges(outside, ranges)] == [(True, False), (False, True)]


def test_the_profile_against_a_case_by_hand():
    times = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 1.0}, "c": {"x": math.inf, "y": 4.0}}
    shares = compare.profile(times)
    at = {factor: i for i, factor in enumerate(compare._FACTORS)}
    assert [shares["x"][at[f]] for f in (1, 2, 3, 4)] == [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    assert [shares["y"][at[f]] for f in (1, 2, 3, 4)] == [2 / 3, 1, 1, 1]


def test_a_comparison_from_its_words_to_its_report(fake, tmp_path, capsys):
    words = ["optimizer=adam,sgd", "budget=4", "seeds=3", "workloads=digits/mlp,digits/cnn", f"out={tmp_path}"]
    assert compare.compare(words) == 0
    assert len(fake) == 2 * (2 * 4 + 2 * 3)
    final = [t for t in fake if t.tested]
    assert {t.seed for t in final} == {1, 2, 3}  # fresh: the search had seed 0
    found = json.loads((tmp_path / "digits_mlp" / "results.json").read_text())
    chosen = max(found["points"]["adam"], key=lambda p: p["val_acc"])
    assert found["best"]["adam"] == {k: v for k, v in chosen.items() if k != "val_acc"}
    assert len(found["points"]["sgd"]) == 4
    assert (tmp_path / "profile.svg").is_file()
    assert (tmp_path / "digits_cnn" / "report.html").read_text().count("<svg") == 4
    assert "share of 2 workloads solved" in capsys.readouterr().out


def test_a_trial_of_a_search_never_reads_the_test_split(tmp_path):
    lines = [*BASE, "data.limit=100", "data.batch_size=50", "model.widths=[8]", "trainer=cpu", "trainer.max_epochs=1"]
    trial = Trial("a", 0, compose_config([*lines, "progress=false", "threads=1"]), tested=False)
    before = dict(os.environ)
    record = run_trials([trial], Store(tmp_path))[trial.key]
    assert dict(os.environ) == before
    assert record["status"] == "finished", record
    assert record["sealed"] == 0
    assert record["val/acc"] == pytest.approx(record["curve"][-1]["val/acc"])
    assert not [key for key in record if key.startswith("test/")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "compare takes one group with several options"),
        (["optimizer=sgd"], "compare takes one group with several options"),
        (["optimizer=sgd,adam", "norm=none,batch"], "compare takes one group"),
        (["optimizer=sgd,adm"], "optimizer=adm is not an option: did you mean adam"),
        (["optimizer=sgd,none"], "optimizer=none has no search space"),
        (["optimizer=sgd,adam", "sampler=grid"], "sampler=grid is none: write one of qmc, tpe, random"),
        (["optimizer=sgd,adam", "workloads=digits"], "workloads=digits is none: write data/model"),
        (["optimizer=sgd,adam", "budget=0"], "budget=0 is no whole number from 1 on"),
    ],
)
def test_bad_words_are_one_line(words, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main.main(["compare", *words, f"out={tmp_path}"])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())

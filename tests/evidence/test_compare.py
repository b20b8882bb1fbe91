"""Fair comparison: the same budget for every arm, points that come again, the edges of a space, the profile."""

import dataclasses
import json
import math
import os
import re
import time

import pytest
import yaml

from knep.cli import main
from knep.config.catalog import CONF, options
from knep.config.compose import Composed, compose_config
from knep.evidence import compare
from knep.evidence.arguments import KEYS, Settings
from knep.evidence.arms import choices
from knep.evidence.study import Whole, each_minute
from knep.evidence.trials import Store, Trial, run_trials
from knep.evidence.tuning import Point, Range, edges, search, space

BASE = ("recipe=none", "data=digits", "model=mlp")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("compare optimizer=sgd,adamw", "target=0.9"),
        ("compare optimizer=sgd,adamw", "slots=clip"),
        ("ablate recipe=modern", "budget=3"),
        ("study norm", "slots=[clip]"),
        ("ledger", "target=0.9"),
        ("verify adamw", "out=x"),
    ],
)
def test_a_setting_of_another_command_is_refused(command, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main.main([*command.split(), word])
    assert end.value.code == 2
    assert f"knep {command.split()[0]} does not read {word}: its settings are" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def bowl(trial):
    """A record whose validation accuracy is best, and its loss lowest, at a rate of 0.01."""
    acc = 0.95 - 0.1 * abs(math.log10(trial.made.config["optimizer"]["lr"] / 0.01))
    test = {"test/acc": acc + 0.001 * trial.seed, "sealed": 1} if trial.tested else {"sealed": 0}
    curve = [{"step": 10, "val/acc": acc / 2}, {"step": 20, "val/acc": acc}]
    val = {"val/acc": acc, "val/loss": 1 - acc + 0.01 * trial.seed}
    about = {"overrides": trial.made.overrides, "arm": trial.arm, "seed": trial.seed, "classes": 10, "curve": curve}
    return {"status": "finished", "cpu_seconds": 1.0, "peak_mib": 1.0} | val | about | test


@pytest.fixture
def fake(monkeypatch):
    """Trials that are not run: what was asked for, as a list."""
    asked = []

    def run(trials, store, processes=1, whole=None):
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
    assert [t.key for t in ran[:30]] == [t.key for t in ran[30:]]
    assert len({t.key for t in ran}) == 30
    assert all(not t.tested for t in ran)
    assert [t.seed for t in ran] == [0, 1, 2] * 20
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
    words = ["optimizer=adam,sgd", "budget=4", "seeds=5", "workloads=digits/mlp,digits/cnn", f"out={tmp_path}"]
    assert compare.compare(words) == 0
    assert len(fake) == 2 * (2 * 4 * 3 + 2 * 5)
    final = [t for t in fake if t.tested]
    assert {t.seed for t in final} == {3, 4, 5, 6, 7}  # fresh: the search had 0 to 2
    found = json.loads((tmp_path / "digits_mlp" / "results.json").read_text())
    chosen = min(found["points"]["adam"], key=lambda p: p["val_loss"])
    assert found["best"]["adam"] == {k: v for k, v in chosen.items() if k != "val_loss"}
    assert len(found["points"]["sgd"]) == 4
    assert (tmp_path / "profile.svg").is_file()
    assert (tmp_path / "digits_cnn" / "report.html").read_text().count("<svg") == 4
    out = capsys.readouterr().out
    assert "share of 2 workloads solved" in out
    assert "2 options, 4 points each with 3 seeds, then 5 fresh seeds of the best: 34 runs on each of 2" in out
    assert re.search(r"(about \d+\.\d|less than a) min(ute)? by what the ledger's runs took", out)


def test_one_lucky_seed_decides_nothing():
    """Of the first seed the rate of 1 looks best, in the mean of three it is the worst."""

    def run(trials):
        found = {}
        for t in trials:
            lucky = t.made.config["optimizer"]["lr"] > 0.5
            loss = 0.01 if lucky and t.seed == 0 else 3.0 if lucky else 0.1
            found[t.key] = {"status": "finished", "val/loss": loss}
        return found

    (points,) = search(choices("optimizer", ["sgd"], BASE, "sgd"), 8, "qmc", run).values()
    assert any(p.values["optimizer.lr"] > 0.5 for p in points)
    assert compare.best(points).values["optimizer.lr"] < 0.5
    failing = search(choices("optimizer", ["sgd"], BASE, "sgd"), 1, "qmc", lambda ts: {t.key: FAILED for t in ts})
    assert failing["sgd"][0].value == math.inf


FAILED = {"status": "failed", "reason": "x"}


def test_time_left_is_of_the_whole_command():
    whole = Whole(10, done=4, ran=2, began=time.monotonic() - 120)
    assert whole.text() == "4 of 10 trials, about 6.0 min left"
    assert Whole(10).text() == "0 of 10 trials"


def test_without_a_terminal_a_line_comes_again_and_again():
    said = []
    with each_minute(lambda: said.append(1), seconds=0.01):
        while len(said) < 3:
            time.sleep(0.01)
    assert len(said) >= 3
    count = len(said)
    time.sleep(0.05)
    assert len(said) == count


@pytest.mark.parametrize("command", ["ablate", "study", "compare", "ledger", "verify"])
def test_help_lists_its_words(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for key in KEYS[command]:
        assert key in out
    own = {f.name for f in dataclasses.fields(Settings)} - {"overrides"}
    named = {key.partition("=")[0] for words in KEYS.values() for key in words}
    assert own <= named


def test_of_an_error_a_search_looks_for_the_lowest(tmp_path):
    points = [Point({"optimizer.lr": lr}, loss) for lr, loss in ((1, 3.0), (2, 1.0), (3, math.inf))]
    assert compare.best(points) is points[1]
    lines = [*BASE, "task=regression", "data=synthetic", "data.images=100", "data.image_size=8", "data.batch_size=20"]
    lines += ["model.widths=[8]", "trainer=cpu", "trainer.max_epochs=1", "scaling=standardize"]
    trial = Trial("a", 0, compose_config([*lines, "progress=false", "threads=1"]), tested=False)
    record = run_trials([trial], Store(tmp_path))[trial.key]
    assert (record["status"], record["sealed"]) == ("finished", 0), record
    assert record["val/rmse"] == pytest.approx(record["curve"][-1]["val/rmse"])
    assert not [key for key in record if key.startswith("test/")]
    (found,) = search(
        choices("optimizer", ["sgd"], lines, "sgd"), 1, "qmc", lambda ts: {t.key: record for t in ts}
    ).values()
    assert found[0].value == pytest.approx(record["val/loss"])


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

"""A cure keeps the prescriptions that help, and says what it tried; its line and its recipe make the same run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from knep.config.catalog import CONF, SLOTS, options
from knep.config.compose import compose_config, compose_recipe
from knep.config.schema import RunConfig
from knep.doctor.cure import candidates
from knep.doctor.cure import search as cures
from knep.doctor.cure.candidates import merged, tidied
from knep.doctor.cure.result import beside, by_recipe, command, load, recipe_yaml
from knep.doctor.cure.search import cure
from knep.doctor.findings import Finding, Report, diseases
from knep.doctor.subject.setup import of
from knep.doctor.trials import treatment
from knep.doctor.trials.scoring import Score
from knep.errors import InputError
from knep.recipes import norm
from tests.doctor.ward import made, patient

_SICK = (
    "recipe=baseline",
    "model=mlp",
    "model.widths=[32]",
    "optimizer=sgd",
    "optimizer.lr=1e-5",
    "data=synthetic",
    "data.images=800",
    "data.image_size=8",
    "trainer.max_epochs=5",
    "threads=1",
)


_WELL = Report(())


def _report(*findings: tuple[str, tuple[tuple[str, ...], ...]]) -> Report:
    found = [Finding(name, "", 0.9 - 0.1 * i).prescribed(*candidates) for i, (name, candidates) in enumerate(findings)]
    return Report(tuple(found), {"trial": {"expected": 0.0}})


@pytest.fixture
def treat(monkeypatch):
    """A cure whose trials reach what a formula of the lines and the seed says: what it has to choose is known."""
    plain = patient(*made(20, 2, 0.1, size=2), classes=2)

    def make(lines):
        if "dropout=stochastic_depth" in lines:
            raise InputError("no residual branch to skip")
        seed = next((int(line[5:]) for line in lines if line.startswith("seed=")), 0)
        return replace(plain, overrides=tuple(line for line in lines if not line.startswith("seed=")), seed=seed)

    def treated(report, accuracy, loss=lambda lines, seed: 1.0, again=_WELL, common=(), **how):
        asked: list[tuple[tuple[str, ...], int]] = []

        def measured(patient):
            asked.append((patient.overrides, patient.seed))
            return Score(loss(patient.overrides, patient.seed), accuracy(patient.overrides, patient.seed))

        monkeypatch.setattr(cures, "measured", measured)
        monkeypatch.setattr(cures, "diagnose", lambda patient: again)
        monkeypatch.setattr(candidates, "usual", lambda report, patient: [])
        monkeypatch.setattr(candidates, "common", lambda patient: list(common))
        return cure(_SICK, make=make, report=report, **how), asked

    return treated


def test_a_line_gives_way_to_what_a_prescription_says():
    lines = ["recipe=none", "init=unit_normal", "optimizer.lr=1", "clip=norm", "clip.theta=0.1"]
    assert merged(lines, ["init=he_normal"]) == (
        "recipe=none",
        "optimizer.lr=1",
        "clip=norm",
        "clip.theta=0.1",
        "init=he_normal",
    )
    assert merged(lines, ["optimizer.lr=0.1"])[-2:] == ("clip.theta=0.1", "optimizer.lr=0.1")
    assert merged(lines, ["clip=none"]) == ("recipe=none", "init=unit_normal", "optimizer.lr=1", "clip=none")
    twice = ("data=digits", "data.limit=100", "optimizer.lr=1", "data.limit=50")
    assert tidied(twice) == ("data=digits", "optimizer.lr=1", "data.limit=50")
    assert compose_config(twice).config == compose_config(tidied(twice)).config


def test_a_rate_far_too_low_is_found_and_cured(monkeypatch):
    monkeypatch.setattr(candidates, "common", lambda patient: [])  # what is prescribed is enough
    cured = cure(_SICK, seconds=25)
    assert cured.report.findings[0].disease == "lr_too_low"
    assert cured.after > cured.before + 0.2
    assert any(line.startswith("optimizer.lr=") for way, _ in cured.kept for line in way)
    assert "optimizer.lr=1e-5" not in cured.overrides


def test_two_cures_of_the_same_lines_are_the_same(monkeypatch):
    monkeypatch.setattr(cures, "diagnose", lambda patient: _WELL)
    data = made(200, 4, 0.2, size=4)

    def make(lines):
        said = dict(line.split("=") for line in lines)
        torch.manual_seed(int(said.get("seed", 0)))
        rate = float(said["optimizer.lr"])
        slow = patient(*data, classes=4)
        return replace(slow, make_optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=rate), epochs=5, batches=4)

    report = _report(("lr_too_low", (("optimizer.lr=0.5",),)))
    with torch.random.fork_rng(devices=[]):
        one, two = (cure(("optimizer.lr=1e-5",), make=make, report=report) for _ in range(2))
    assert one.kept
    assert one.after > one.before + 0.2
    assert (one.overrides, one.before, one.after, one.tried) == (two.overrides, two.before, two.after, two.tried)


def _adding(**worth):
    """Accuracy 0.5 and what each group of the lines is worth, by seed."""

    def accuracy(lines, seed):
        return 0.5 + sum(gains[seed] for name, gains in worth.items() if any(w.startswith(f"{name}=") for w in lines))

    return accuracy


def test_the_way_that_gains_most_is_kept_and_another_on_top(treat):
    report = _report(("no_decay", (("clip=norm",), ("augment=shift",), ("scheduler=cosine",))))
    cured, _ = treat(report, _adding(clip=(0.1,) * 3, scheduler=(0.2,) * 3, augment=(-0.3,) * 3))
    assert [way for way, _ in cured.kept] == [("scheduler=cosine",), ("clip=norm",)]
    assert (cured.before, cured.after) == pytest.approx((0.5, 0.8))
    assert cured.overrides == (*_SICK, "scheduler=cosine", "clip=norm")
    assert dict(cured.tried)[("augment=shift",)] == pytest.approx(0.2)
    assert "not kept: augment=shift" in str(cured)


def test_what_another_examination_prescribes_is_tried_on_top(treat):
    first, again = _report(("no_decay", (("clip=norm",),))), _report(("unscaled_inputs", (("scaling=standardize",),)))
    cured, _ = treat(first, _adding(clip=(0.1,) * 3, scaling=(0.2,) * 3), again=again)
    assert [way for way, _ in cured.kept] == [("clip=norm",), ("scaling=standardize",)]


def test_a_way_that_helps_one_seed_alone_is_not_kept(treat):
    cured, _ = treat(_report(("no_decay", (("clip=norm",),))), _adding(clip=(0.015, 0.0, 0.0)))
    assert not cured.kept
    assert cured.overrides == _SICK
    assert cured.before == cured.after
    assert "no prescription helped" in str(cured)


@pytest.mark.parametrize(("last", "kept"), [(-0.1, 1), (-0.3, 1), (0.1, 2)])
def test_what_a_seed_that_chose_nothing_does_not_bear_out_is_given_back(treat, last, kept):
    report = _report(("no_decay", (("scheduler=cosine",), ("clip=norm",))))
    cured, _ = treat(report, _adding(scheduler=(0.2, 0.2, 0.1), clip=(0.1, 0.1, last)))
    assert len(cured.kept) == kept
    worse, _ = treat(report, _adding(scheduler=(0.2, 0.2, -0.2), clip=(0.1, 0.1, last)))
    assert not worse.kept
    assert worse.overrides == _SICK


def test_a_much_lower_loss_counts_where_accuracy_is_no_lower(treat):
    report = _report(("no_decay", (("stopping=early",),)))

    def loss(lines, seed):
        return 0.7 if "stopping=early" in lines else 1.0

    assert [way for way, _ in treat(report, _adding(), loss)[0].kept] == [("stopping=early",)]
    assert not treat(report, _adding(stopping=(-0.01,) * 3), loss)[0].kept


def test_a_cure_ends_when_its_seconds_are_over(treat):
    report = _report(("no_decay", (("clip=norm",), ("scheduler=cosine",))))
    cured, asked = treat(report, _adding(), seconds=1e-9)
    assert not cured.kept
    assert {lines for lines, _ in asked} == {_SICK}
    assert "--budget" in cured.note
    assert cured.note in str(cured)


def test_a_way_that_does_not_fit_is_said_and_no_failure(treat):
    report = _report(("no_decay", (("dropout=stochastic_depth",), ("clip=norm",))))
    cured, _ = treat(report, _adding(clip=(0.2,) * 3))
    assert [way for way, _ in cured.kept] == [("clip=norm",)]
    assert "does not fit this run: dropout=stochastic_depth" in str(cured)


def test_a_validation_split_that_cannot_be_trusted_chooses_nothing(treat):
    cured, asked = treat(_report(("no_decay", (("clip=norm",),)), ("leaked_validation", ())), _adding())
    assert not asked
    assert not cured.kept
    assert "mend that first" in str(cured)


def test_what_only_the_user_can_mend_is_said(treat):
    finding = Finding("double_softmax", "", 0.9, mend="let the model return scores")
    cured, _ = treat(Report((finding,)), _adding(), common=[("scaling=standardize",)])
    assert cured.trials == 1  # no lines are tried against what lines cannot mend
    assert "for you to mend: softmax is applied twice: let the model return scores" in str(cured)


@pytest.fixture(scope="module")
def config():
    return compose_config(_SICK).config


def _seen(disease: str, config, limit: int | None = None) -> list[tuple[str, ...]]:
    seen = patient(*made(200, 4, 0.1), classes=4)
    seen = replace(seen, epochs=5, run=RunConfig.of(config | {"data": config["data"] | {"limit": limit}}))
    return [*candidates.usual(_report((disease, ())), seen), *candidates.common(seen)]


@pytest.mark.parametrize(("expected", "said"), [(0.9, True), (0.61, False)])
def test_a_cure_that_ends_behind_simple_classifiers_says_so(treat, expected, said):
    report = replace(_report(("no_decay", (("clip=norm",),))), measured={"trial": {"expected": expected}})
    cured, _ = treat(report, _adding(clip=(0.1, 0.1, 0.1)))
    assert cured.kept
    assert ("simple classifiers reach" in str(cured)) is said


def test_overfitting_is_met_by_more_of_the_images_that_there_are_and_by_an_end_in_time(config):
    tried = _seen("overfitting", config, 40)
    assert ("data.limit=400",) in tried
    assert any("stopping=early" in way for way in tried)
    assert ("model.widths=[16]",) in tried
    assert not any(line.startswith("data.limit") for way in _seen("overfitting", config) for line in way)


def test_what_is_usual_names_options_and_keys_that_there_are(config):
    keys = {line for disease in diseases() for way in _seen(disease, config, 40) for line in way}
    values = [line for line in keys if "." in line.partition("=")[0]]
    for line in keys.difference(values):
        assert line.partition("=")[2] in options(line.partition("=")[0]), line
    for line in values:
        group, key = line.partition("=")[0].split(".")
        stored = [yaml.safe_load((CONF / group / f"{option}.yaml").read_text()) for option in options(group)]
        assert any(key in node for node in stored), line


@pytest.mark.parametrize(("expected", "kept"), [(0.9, 2), (0.6, 1)])
def test_what_is_worth_a_trial_anywhere_is_tried_where_much_is_missing(treat, expected, kept):
    report = replace(_report(("no_decay", (("clip=norm",),))), measured={"trial": {"expected": expected}})
    worth = _adding(clip=(0.1,) * 3, scaling=(0.2,) * 3)
    cured, _ = treat(report, worth, common=[("scaling=standardize",)])
    assert len(cured.kept) == kept


def test_what_is_worth_a_trial_anywhere_is_tried_where_no_prescription_helps(treat):
    report = _report(("no_decay", (("clip=norm",),)))
    cured, _ = treat(report, _adding(scaling=(0.2,) * 3), common=[("scaling=standardize",)])
    assert [way for way, _ in cured.kept] == [("scaling=standardize",)]


def test_a_value_that_helped_is_tried_nearby():
    assert candidates.finer(("optimizer=adam", "optimizer.lr=0.001")) == [
        ("optimizer.lr=0.003",),
        ("optimizer.lr=0.0003",),
    ]
    assert candidates.finer(("trainer.max_epochs=8",)) == [("trainer.max_epochs=32",)]
    assert candidates.finer(("clip=norm",)) == []


def test_a_rate_is_refined_in_the_next_round(treat):
    def accuracy(lines, seed):
        return {"optimizer.lr=0.1": 0.7, "optimizer.lr=0.3": 0.9}.get(lines[-1], 0.5)

    cured, _ = treat(_report(("lr_too_low", (("optimizer.lr=0.1",),))), accuracy)
    assert [way for way, _ in cured.kept] == [("optimizer.lr=0.1",), ("optimizer.lr=0.3",)]
    assert cured.overrides.count("optimizer.lr=0.3") == 1
    assert "optimizer.lr=0.1" not in cured.overrides


def test_groups_that_a_trial_does_not_run_are_not_tried():
    report = _report(("loss_spikes", (("clip=norm",), ("guard=skip",), ("averaging=ema",))))
    assert candidates.prescribed(report) == [("clip=norm",)]


@pytest.mark.parametrize("lines", [_SICK, ("recipe=fashion_fast", "data.limit=200", "optimizer.lr=0.01"), ()])
def test_the_recipe_and_the_lines_beside_it_make_the_same_run(tmp_path, lines):
    whole = compose_config(lines)
    (tmp_path / "recipe").mkdir()
    path = tmp_path / "recipe" / "cured.yaml"
    path.write_text(recipe_yaml(whole, "Cured."))
    words = shlex.split(by_recipe(path, whole))
    assert words[:4] == ["python", "train.py", "--config-dir", str(tmp_path)]
    again = compose_config(words[4:], [f"file://{tmp_path}"])
    assert {k: v for k, v in again.choices.items() if k != "recipe"} == {
        k: v for k, v in whole.choices.items() if k != "recipe"
    }
    assert again.config == whole.config
    loaded = compose_recipe("cured", [], [f"file://{tmp_path}"])  # what the call for a loop of one's own reads
    assert {slot: loaded[slot] for slot in SLOTS} == {slot: whole.config[slot] for slot in SLOTS}


def test_the_recipe_of_a_cure_is_plain_yaml():
    text = recipe_yaml(compose_config(["recipe=modern", "model=cnn"]), "A note.")
    assert text.startswith("# @package _global_")
    loaded = yaml.safe_load(text)
    choices = compose_config(["recipe=modern", "model=cnn"]).choices
    assert {"override /init": choices["init"]} in loaded["defaults"]
    assert {"override /optimizer": choices["optimizer"]} in loaded["defaults"]
    assert "_target_" not in text


def test_lines_are_fit_for_a_shell():
    lines = ["model.widths=[8, 4]", "name=it's"]
    assert shlex.split(command(lines))[2:] == lines
    composed = compose_config(["data=digits", "data.batch_size=32", "model=mlp", "optimizer=sgd"])
    assert set(beside(composed)) == {"data=digits", "data.batch_size=32", "model=mlp"}
    assert load(Path("conf/recipe/cured.yaml")).startswith('recipe = knep.load("cured"')


def test_what_is_not_sick_is_left_as_it_is():
    lines = [*_SICK[:3], "optimizer=adam", "optimizer.lr=1e-2", *_SICK[5:-2], "trainer.max_epochs=20", "threads=1"]
    cured = cure(lines)
    assert not cured.kept
    assert cured.overrides == tuple(lines)


@pytest.mark.parametrize(
    ("sick", "cured", "kept"),
    [
        ((0.5, 0.6, 0.6), (0.9, 0.9, 0.7), True),
        ((0.5, 0.6, 0.9), (0.9, 0.9, 0.9), True),  # it happened to learn once, as it was
        ((0.86, 0.86, 0.9), (0.9, 0.9, 0.9), False),
        ((0.7, 0.7, 0.9), (0.9, 0.9, 0.6), False),
    ],
    ids=["borne out", "the sick run had luck", "little, and not borne out", "worse elsewhere"],
)
def test_a_third_seed_has_the_last_word_but_for_a_large_gain(sick, cured, kept):
    start, lines = ("model=mlp",), ("model=mlp", "optimizer.lr=0.01")
    ward = cures._Ward(make=patient, told=print, until=0.0)
    for seed, (before, after) in enumerate(zip(sick, cured, strict=True)):
        ward.seen[start, seed], ward.seen[lines, seed] = Score(1.0, before), Score(1.0, after)
    way = ("optimizer.lr=0.01",)
    assert cures._borne_out(ward, start, lines, [(way, 0.9)]) == ((lines, [(way, 0.9)]) if kept else (start, []))


@pytest.mark.parametrize(("momentum", "lines"), [(0.001, ("norm=batch", "norm.momentum=0.1")), (0.1, ("norm=group",))])
def test_slow_statistics_are_quickened_by_lines_that_change_the_net(momentum, lines):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten())
    x = torch.randn(8, 1, 8, 8)
    batches = [(x, torch.arange(8))]
    slow = of(net, batches, batches, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1))
    assert treatment._ways(slow, Finding("stale_statistics", "", 0.8))[0][0] == lines
    if lines != ("norm=group",):
        assert norm.batch(net, sample=x, momentum=0.1)

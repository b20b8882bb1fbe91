"""The clinic's own checks: its cases, what counts as sick, its table; and the smoke clinic of 40 cases."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from knep.config.catalog import options
from knep.doctor.findings import diseases
from scripts.clinic import suffering
from scripts.clinic.__main__ import select
from scripts.clinic.cases.bad_data import cut, leaked, rare, shifted_labels, sorted_by_class
from scripts.clinic.cases.bad_model import narrow, partly_optimized
from scripts.clinic.cases.case import Case, patient, twin
from scripts.clinic.cases.catalogue import cases
from scripts.clinic.peers import _AUDIT, _DOCTOR, _MORTEM, watched
from scripts.clinic.rounds import _kept, examine
from scripts.clinic.table import page, rows, shown, totals
from scripts.clinic.workers import each
from tests.doctor.cases.held_out import HELD_OUT
from tests.doctor.cases.pictures import PICTURES
from tests.doctor.cases.sequences import SEQUENCES
from tests.doctor.cases.tables import TABLES

# One of each kind of mistake and of net, cheap to examine; the bars below are on exactly these.
SICK = (
    "unscaled_inputs/mlp_sgd/raw",
    "non_finite_inputs/mlp/some_nan",
    "constant_inputs/synthetic_mlp/black",
    "constant_labels/mlp/zero",
    "labels_out_of_range/mlp/one_more",
    "labels_off_by_one/synthetic_mlp/train",
    "unrelated_labels/mlp/all",
    "class_imbalance/mlp/half",
    "sorted_batches/mlp_sgd/all",
    "leaked_validation/hard_mlp/all",
    "validation_scaled_differently/mlp/inverted",
    "vanishing_gradient/deep_mlp/sigmoid",
    "exploding_gradient/deep_mlp/unit_normal",
    "dying_relu/sequential/mlp_dead",
    "saturation/sequential_tanh/large",
    "symmetric_weights/mlp/constant",
    "signal_collapse/deep_sgd/large_biases",
    "double_softmax/sequential_sgd/mlp_softmax",
    "cut_off/mlp_sgd/head_only",
    "frozen_parameters/deep_sequential/features",
    "stale_statistics/mlp_bn/still",
    "too_little_capacity/mlp/two",
    "lr_too_high/mlp_sgd/lr=10.0",
    "lr_too_low/mlp_sgd/lr=3e-05",
    "clip_throttles/mlp_sgd/norm",
    "weight_decay_too_large/mlp_sgd/1",
    "momentum_instability/swing_mlp/0.999",
    "too_much_dropout/mlp/0.97",
    "too_much_penalty/mlp/l1",
    "stopping_too_early/mlp_sgd/one_epoch",
)
HEALTHY = (
    "healthy/net/mlp_sgd",
    "healthy/net/mlp_bn",
    "healthy/net/deep_norm",
    "healthy/net/sequential_tanh",
    "healthy/net/few_mlp",
    "healthy/net/synthetic_sgd",
    "healthy/recipe/baseline/mlp",
    "healthy/recipe/modern/mlp",
    "healthy/dose/dropout/mlp",
    "healthy/own_loop/mlp",
)


def test_enough_cases_of_every_disease_in_each_half():
    sick = [case for case in cases().values() if case.disease]
    assert len(sick) >= 300
    assert len(cases()) - len(sick) >= 150
    known = {case.disease for case in sick}
    for disease in known:
        halves = [case.half for case in sick if case.disease == disease]
        assert len(halves) >= 8, disease
        assert min(halves.count("A"), halves.count("B")) >= 3, disease
    other = {**TABLES, **SEQUENCES, **PICTURES, **HELD_OUT}
    other_tasks = {name for rights in other.values() for name in rights.split()}
    examined = {name for name, disease in diseases().items() if disease.seen == "examination"}
    assert known <= examined <= known | other_tasks


def test_no_two_cases_of_different_halves_are_the_same_instance():
    seen: dict[str, str] = {}
    for case in cases().values():
        assert seen.setdefault(case.key, case.half) == case.half, case.name


def test_every_recipe_and_every_sound_option_is_among_the_healthy():
    from scripts.clinic.cases.healthy import PUBLISHED, SLOTS, UNSOUND

    said = " ".join(case.name for case in cases().values() if not case.disease)
    for recipe in options("recipe"):
        assert (f"recipe/{recipe}/" in said) != (recipe in PUBLISHED)
    for slot in SLOTS:
        for option in options(slot):
            assert (f"option/{slot}={option}/" in said) != (f"{slot}={option}" in UNSOUND), (slot, option)


@pytest.mark.parametrize(
    ("name", "sick"),
    [
        ("lr_too_low/mlp_sgd/lr=3e-05", True),
        ("leaked_validation/hard_mlp/all", True),
        ("labels_out_of_range/mlp/one_more", True),
    ],
)
def test_a_case_counts_where_training_suffers(name, sick):
    assert suffering.measure(cases()[name])["counts"] is sick


def test_a_case_that_changes_nothing_does_not_count():
    base = cases()["lr_too_low/mlp_sgd/lr=3e-05"].base
    row = suffering.measure(Case("", "lr_too_low", "none", base, ("log_every=20",)))
    assert not row["counts"]
    assert row["acc"] == row["twin_acc"]


def test_a_healthy_case_counts_where_it_learns():
    sound = cases()["healthy/net/mlp_sgd"]
    assert suffering.measure(sound)["counts"]
    assert not suffering.measure(Case("", "", "", (*sound.base, "trainer.max_epochs=1", "optimizer.lr=1e-4")))["counts"]


def test_two_points_count_and_chance_does_not():
    row = {"acc": 0.93, "twin_acc": 0.96, "loss": 0.2, "twin_loss": 0.2}
    assert suffering._suffers(row, 10_000, "acc")
    assert not suffering._suffers(row, 100, "acc")
    assert not suffering._suffers(row | {"acc": 0.95}, 10_000, "acc")
    assert suffering._suffers(row | {"acc": 0.96, "loss": 0.4}, 100, "loss")
    assert not suffering._suffers(row | {"acc": 0.96, "loss": 0.4}, 100, "acc")


@pytest.mark.parametrize(("monitor", "loss"), [("val/loss", 0.8), ("val/acc", 0.85)])
def test_a_case_is_judged_where_early_stopping_ends_it(monkeypatch, monitor, loss):
    from types import SimpleNamespace

    from knep.doctor.trials import run as trial
    from knep.doctor.trials import scoring

    course = [(1.0, 0.1), (0.8, 0.2), (0.85, 0.3), (0.9, 0.3), (0.95, 0.3), (0.1, 0.9)]
    run = trial.Trial(curve=[(i, scoring.Score(*pair)) for i, pair in enumerate(course)])
    monkeypatch.setattr(trial, "run", lambda *a, **how: run)
    asked = SimpleNamespace(stopping=2, min_delta=0.0, monitor=monitor, total_steps=6, epochs=6)
    assert suffering._trained(asked)[0].loss == loss
    asked.stopping = None
    assert suffering._trained(asked)[0].loss == 0.1


def test_mutations_leave_the_twin_alone_and_do_what_they_say():
    case = cases()["class_imbalance/mlp/half"]
    well, before = twin(case), twin(case)
    few = rare(well, classes=5, keep=0.02)
    y = torch.cat([b[1] for b in few.train])
    assert int((y == 0).sum()) * 20 < int((y == 9).sum())
    ordered = sorted_by_class(well)
    assert not ordered.shuffled
    assert bool((torch.cat([b[1] for b in ordered.train]).diff() >= 0).all())
    off = shifted_labels(well, split="val")
    assert torch.equal((well.val[0][1] + 1) % 10, off.val[0][1])
    assert torch.equal(leaked(well).val[0][0][:64], well.train[0][0])
    assert next(narrow(well).model.parameters()).dtype == torch.float16
    optimizer = partly_optimized(well).make_optimizer(well.model)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2
    for (x, labels), (x0, labels0) in zip(well.train, before.train, strict=True):
        assert torch.equal(x, x0)
        assert torch.equal(labels, labels0)
    assert all(torch.equal(a, b) for a, b in zip(well.model.parameters(), before.model.parameters(), strict=True))


def test_cut_gives_whole_batches_or_one():
    x, y = torch.zeros(10, 1), torch.zeros(10)
    assert [len(b[1]) for b in cut(x, y, 4)] == [4, 4]
    assert [len(b[1]) for b in cut(x, y, 16)] == [10]


def test_a_child_that_dies_hangs_or_raises_is_a_recorded_failure():
    die, hang, wrong = "__import__('os')._exit(3)", "__import__('time').sleep(60)", "1 / 0"
    answers = dict(each(eval, [die, wrong, hang, "{'got': 2}"], 1, 1.0))
    assert answers[die] == {"failure": "the process died with exit code 3"}
    assert answers[wrong] == {"failure": "ZeroDivisionError: division by zero"}
    assert "no answer within 1 s" in answers[hang]["failure"]
    assert answers["{'got': 2}"] == {"got": 2}


def test_what_was_measured_is_kept_until_the_case_changes(tmp_path):
    case = Case("{'counts': 1}", "", "", ("a",))
    assert _kept(tmp_path / "rows.json", [case], eval, 1) == {case.name: {"counts": 1, "key": case.key}}
    kept = _kept(tmp_path / "rows.json", [case], _never, 1)
    assert kept[case.name]["counts"] == 1
    changed = replace(case, base=("b",))
    assert "failure" in _kept(tmp_path / "rows.json", [changed], _never, 1)[case.name]


def _never(name):
    raise AssertionError(name)


def test_the_table_counts_and_lists_every_miss():
    sick = Case("a/x", "lr_too_high", "", (), curable=True, also=("momentum_instability",))
    other, well, crash = Case("a/y", "lr_too_high", "", ()), Case("h/x", "", "", ()), Case("h/y", "", "", ())
    found = {
        "a/x": {"findings": [["momentum_instability", 0.9, ""], ["lr_too_low", 0.1, ""]], "seconds": 2.0},
        "a/y": {
            "findings": [["loss_spikes|no_decay", None, ""], ["overfitting|lr_too_high", None, ""]],
            "seconds": 4.0,
        },
        "h/x": {"findings": [], "seconds": 1.0},
        "h/y": {"failure": "it died"},
    }
    cured = {"a/x": {"acc": 0.95, "twin_acc": 0.96}}
    table = rows([sick, other, well, crash], found, cured)
    total = totals([sick, other, well, crash], found, cured)
    assert total["recall"] == 100
    assert total["top"] == 50
    assert total["top_strict"] == 0
    assert total["among"] == 100
    assert total["false_alarms"] == 50
    assert total["cured"] == 100
    assert table[0]["misses"] == ["a/y: loss_spikes|no_decay, overfitting|lr_too_high"]
    assert table[1]["misses"] == ["h/y: it died"]
    assert "lr_too_high" in shown("", table, total)


def test_what_peers_say_is_mapped_to_diseases_that_exist():
    said = {name for table in (_AUDIT, _DOCTOR, _MORTEM) for names in table.values() for name in names.split("|")}
    assert said <= set(diseases())


def test_a_peer_watches_a_run_to_its_end_and_survives_an_error_in_training():
    class Watcher:
        seen: ClassVar[list[float]] = []

        def __init__(self, model, optimizer):
            self.model = model

        def forward(self, x):
            return self.model(x)

        def backward(self, loss):
            loss.backward()

        def step(self, step, facts):
            self.seen.append(facts["loss"])

        def answers(self):
            return [("lr_too_high", f"{len(self.seen)} steps")]

    short = cases()["healthy/net/mlp_sgd"]
    short = replace(short, base=(*short.base, "trainer.max_epochs=2"))
    assert watched(patient(short), Watcher) == [("lr_too_high", "32 steps")]
    assert Watcher.seen[-1] < Watcher.seen[0]
    Watcher.seen.clear()
    broken = cases()["labels_out_of_range/mlp/one_more"]
    assert watched(patient(broken), Watcher)[0][0] == "lr_too_high"
    assert len(Watcher.seen) < 16


def test_cases_are_chosen_by_half_disease_and_name():
    known = list(cases().values())
    assert {case.disease for case in select(known, "both", ["cut_off"])} == {"cut_off"}
    assert {case.half for case in select(known, "B", None)} == {"B"}
    assert not any(case.disease for case in select(known, "A", ["healthy"]))
    with pytest.raises(SystemExit, match="no case is called so"):
        select(known, "both", ["nothing"])


def test_a_page_of_several_doctors_sets_them_side_by_side_and_lists_the_misses_of_the_first():
    chosen = select(list(cases().values()), "both", ["cut_off"])[:2]
    right = {case.name: {"findings": [[case.disease, 1.0, "why"]], "seconds": 1.0} for case in chosen}
    wrong = {case.name: {"findings": [], "seconds": 1.0} for case in chosen}
    made = [(name, rows(chosen, f, {}), totals(chosen, f, {})) for name, f in (("knep", right), ("other", wrong))]
    text = page(made, "command", "")
    assert "| what | bar | knep | other |" in text
    assert "| sick found | >= 99 | 100 | 0 |" in text
    assert "Not as they should be" not in text
    assert chosen[0].name in page(made[1:], "command", "")


def test_the_smoke_clinic_has_forty_cases_of_most_diseases():
    assert len({*SICK, *HEALTHY}) == 40
    assert {*SICK, *HEALTHY} <= set(cases())
    assert len({cases()[name].disease for name in SICK}) == 30


# Of 30 findings one may be wrong; of the few of the plain run none.
QUICK = [*SICK[4::5], *HEALTHY[::5]]


@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [
        QUICK,
        pytest.param((*SICK, *HEALTHY)[::2], marks=pytest.mark.slow),
        pytest.param((*SICK, *HEALTHY)[1::2], marks=pytest.mark.slow),
    ],
    ids=["quick", "0", "1"],
)
def test_the_smoke_clinic_passes_the_bars(names):
    chosen = [cases()[name] for name in names]
    found = {case.name: examine("knep", case.name) for case in chosen}
    total = totals(chosen, found, {})
    told = shown("", rows(chosen, found, {}), total)
    assert total["recall"] >= 99, told
    assert total["false_alarms"] <= 1, told
    assert total["top"] >= 92, told
    assert total["among"] >= 98, told

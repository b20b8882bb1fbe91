"""Ledger, cards and verify: pages agree with their data, what has no number says so, a number that moved is seen."""

import datetime
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from knep.cli import main
from knep.config import catalog
from knep.config.catalog import options
from knep.evidence import cards, ledger, readme_table, trials, verify
from knep.utils.bits import packed

ROOT = Path(__file__).parent.parent.parent
COMMITTED = ROOT / "docs" / "cards"


WIDE = "[+1.71, +2.29]"  # no interval is narrower than that of a deviation of one test image, here of six pairs


def record(trial, acc):
    curve = [{"step": 20, "val/acc": acc}]
    of_trial = {"overrides": trial.made.overrides, "arm": trial.arm, "seed": trial.seed}
    measured = {"test/acc": acc, "val/acc": acc, "test/right": packed(np.arange(359) < acc * 359), "classes": 10}
    cost = {"cpu_seconds": 1.0, "peak_mib": 100.0}
    return {"status": "finished", "curve": curve, **measured, **cost, **of_trial}


def said(trials, acc):
    return {t.key: record(t, acc(t)) for t in trials}


def steady(trial):
    """Accuracy by arm and seed: clip=norm gives two points more than clip=none, seeds differ by a third of a point."""
    return 0.9 + 0.02 * (trial.arm == "norm") + 0.003 * (trial.seed % 3 - 1)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A ledger of `clip` on digits/mlp in a folder of its own, its trials made up."""
    monkeypatch.setattr(catalog, "_RESULTS", tmp_path / "results")
    monkeypatch.setattr(ledger, "run", lambda trials, store, processes: said(trials, steady))
    words = ["slots=clip", "workloads=digits/mlp", "seeds=6", f"results={tmp_path}/results", f"out={tmp_path}/out"]
    assert ledger.ledger(words) == 0
    return tmp_path


def test_the_cards_agree_with_their_data():
    assert sorted(str(path) for path in cards.outdated(COMMITTED)) == []
    extra = {p.relative_to(COMMITTED).as_posix() for p in COMMITTED.rglob("*.md")} - set(cards.pages())
    assert not extra


def test_every_measured_option_has_a_card_with_its_number_and_all_others_are_listed_as_not_measured():
    contents = (COMMITTED / "README.md").read_text().partition("## Not measured yet")[2]
    known = {f"{slot}/{cell['option']}" for slot, cell in verify.measured()}
    for slot in (*cards.SLOTS, *cards.TASK_SLOTS):
        for option in options(slot):
            name, text = f"{slot}/{option}", (COMMITTED / slot / f"{option}.md").read_text()
            assert (name in known) != ("Not measured yet." in text), name
            assert (name in known) != (f"[{name}]" in contents), name


def test_no_card_is_without_data():
    assert cards.overlooked() == []
    assert {name.partition("/")[0] for name in cards.unmeasured()} <= {"init"}  # of transformers


def test_every_option_says_when_not_to_use_it_and_nothing_else_does():
    about = cards._about()
    assert {s: sorted(about[s]) for s in about} == {s: options(s) for s in (*cards.SLOTS, *cards.TASK_SLOTS)}
    assert all(len(entry["not"]) > 5 for slot in about.values() for entry in slot.values())
    upstream = [
        o for o in options("optimizer") if "_target_: knep." not in (catalog.CONF / f"optimizer/{o}.yaml").read_text()
    ]
    assert [o for o in upstream if "equation" not in about["optimizer"][o]] == []


def test_the_ledger_keeps_effects_and_adds_workloads(measured):
    data = json.loads((measured / "results" / "clip.json").read_text(), parse_constant=pytest.fail)
    cells = {c["option"]: c for c in data["cells"]}
    assert sorted(cells) == options("clip")
    assert cells["norm"]["effect"]["accuracy"]["mean"] == pytest.approx(0.02)
    assert cells["norm"]["effect"]["verdict"] == "helps"
    assert cells["value"]["effect"]["verdict"] == "no evidence"
    assert cells["none"]["effect"] is None
    assert cells["norm"]["lines"][-1] == "clip=norm"
    words = [f"results={measured}/results", f"out={measured}/out", "slots=stopping", "seeds=2"]
    ledger.ledger([*words, "workloads=digits/mlp"])
    ledger.ledger([*words, "workloads=digits/cnn"])
    found = json.loads((measured / "results" / "stopping.json").read_text())["cells"]
    assert [(c["option"], c["workload"]) for c in found] == [
        (option, workload) for workload in ("digits/mlp", "digits/cnn") for option in ("early", "none")
    ]


def test_options_that_are_measured_later_keep_the_control_beside_them(measured, monkeypatch):
    monkeypatch.setattr(ledger, "run", lambda trials, store, processes: said(trials, lambda t: steady(t) - 0.03))
    words = ["slots=clip", "options=value", "workloads=digits/mlp", "seeds=6", f"out={measured}/out"]
    for folder in (f"{measured}/results", f"{measured}/new"):
        assert ledger.ledger([*words, f"results={folder}"]) == 0
        cells = {c["option"]: c for c in json.loads(Path(folder, "clip.json").read_text())["cells"]}
        assert cells["value"]["effect"]["accuracy"]["mean"] == 0  # and not -0.03, of the control of the first day
        assert cells["value"]["effect"]["images"] == [0, 0]


def test_a_card_is_stale_as_soon_as_its_data_change(measured):
    folder = measured / "cards"
    assert cards.cards([str(folder)]) == 0
    assert not cards.outdated(folder)
    text = (folder / "clip" / "norm.md").read_text()
    assert f"+2.00 {WIDE}" in text
    assert "helps" in text
    assert "python train.py recipe=none" in text
    path = measured / "results" / "clip.json"
    path.write_text(path.read_text().replace('"verdict": "helps"', '"verdict": "hurts"'))
    assert {p.name for p in cards.outdated(folder)} == {"norm.md", "README.md"}
    path.unlink()
    assert len(cards.outdated(folder)) == len(options("clip")) + 1
    assert len(cards.unmeasured()) == sum(len(options(slot)) for slot in cards.SLOTS)


def test_ls_shows_the_headline_number(measured, capsys):
    main.main(["ls", "clip"])
    assert f"digits/mlp +2.00 {WIDE} n=6" in capsys.readouterr().out


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (0.002, 0), (-0.02, 1), (-0.05, 1), (0.05, 1)])
def test_verify_fails_where_a_number_leaves_its_interval(measured, monkeypatch, capsys, shift, code):
    asked = []

    def run(trials, store, processes):
        asked.extend(trials)
        return said(trials, lambda t: steady(t) + shift * (t.arm == "norm"))

    monkeypatch.setattr(verify, "run_trials", run)
    assert verify.verify(["clip/norm"]) == code
    assert {t.seed for t in asked} == set(range(6, 16))  # none that the card has seen
    assert {t.arm for t in asked} == {"norm", "none"}
    assert ("NOT as its card says" in capsys.readouterr().out) == bool(code)


def test_verify_of_the_day_takes_other_cards_tomorrow(measured):
    days = [datetime.date(2026, 11, 25) + datetime.timedelta(days=i) for i in range(5)]
    names = [[cell["option"] for _, cell in verify.today(day)] for day in days]
    assert all(len(set(pair)) == 2 for pair in names)
    assert all(set(a) != set(b) for a, b in pairwise(names))
    assert {name for pair in names for name in pair} == set(options("clip"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["norm", "workload=digits/cnn"], "workload=digits/cnn: norm was not measured there"),
        (["clip/nrm"], "there is no measured card clip/nrm"),
        (["clip/norm", "optimizer.lr=1"], "optimizer.lr=1: verify takes"),
    ],
)
def test_verify_says_what_is_wrong_in_one_line(measured, words, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["verify", *words])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def test_every_arm_of_the_ledger_composes_or_is_refused_with_a_reason():
    spec = ledger.spec()
    assert set(spec["slots"]) == set(cards.SLOTS)
    for slot in ("dropout", "regularization"):
        made, refused = ledger.arms(slot, "digits/mlp", spec)
        assert sorted([*(arm.option for arm in made), *refused]) == options(slot)
        assert set(refused) == ({"dropblock", "spatial", "stochastic_depth"} if slot == "dropout" else set())


def test_a_workload_of_the_headline_takes_those_options_and_the_controls(measured):
    spec = ledger.spec()
    for workload, slots in spec["headline"].items():
        assert workload in spec["workloads"]
        assert [f"{s}={o}" for s, named in slots.items() for o in named if o not in options(s)] == []
    made, refused = ledger.arms("optimizer", "fashion_6000/cnn", spec)
    assert [arm.option for arm in made] == ["adamw", "momentum", "muon", "schedule_free", "sgd"]
    assert not refused
    words = ["slots=stopping", "workloads=fashion_6000/cnn", "seeds=2", f"results={measured}/results"]
    assert ledger.ledger([*words, f"out={measured}/out"]) == 0
    assert not (measured / "results" / "stopping.json").exists()


def test_readmes_table_is_the_ledgers_and_is_filled_by_the_cards_command(measured, monkeypatch):
    monkeypatch.chdir(measured)
    page = measured / "README.md"
    page.write_text(f"before {readme_table.START}\nold\n{readme_table.END} after\n")
    main.main(["cards"])
    lines = page.read_text().splitlines()
    assert lines[0] == f"before {readme_table.START}"
    assert lines[-1] == f"{readme_table.END} after"
    assert len(lines) == 6  # clip=norm lies on one workload alone: nothing can be pooled
    assert "After Holm over these 0 rows" in page.read_text()
    assert readme_table.filled(page.read_text()) == page.read_text()
    assert readme_table.filled("no marks") == "no marks"


def test_readme_shows_what_is_named_whatever_came_of_it():
    rows = [line for line in readme_table.table().splitlines() if line.startswith("| [`")]
    shown = [f"{slot}={option}" for slot, some in ledger.spec()["shown"].items() for option in some]
    assert [row.split("`")[1] for row in rows] == shown


def commands(text):
    return re.findall(r"`((?:python|knep) [^`]*)`", text)


def test_every_command_on_a_card_is_of_what_exists():
    """Options, workloads and cards by name; that the ledger's lines compose, other tests see."""
    lines, cards_named = set(), set()
    for path in COMMITTED.rglob("*.md"):
        text = path.read_text()
        assert "/tmp" not in text, path
        assert "replay=" not in text, path
        for command in commands(text):
            words = command.split()
            if words[:2] == ["python", "train.py"]:
                lines |= set(words[2:])
            elif words[:2] == ["knep", "verify"] and len(words) > 2:
                cards_named.add(words[2])
            else:
                assert words[:2] in (["knep", "cards"], ["knep", "compare"], ["knep", "verify"]), command
    assert len(lines) > 100
    for name in cards_named:
        verify.find(name)
    for line in lines:
        key, _, value = line.partition("=")
        assert "/" not in value, line
        assert key not in catalog.GROUPS or value in options(key), line


def test_a_failed_trial_keeps_no_path_of_a_folder_that_is_thrown_away():
    said = "step 0: the gradient is not finite; the step is kept in /x/run/blackbox.pt, look at it with: knep /x/run"
    assert trials.without_folder(said, Path("/x")) == "step 0: the gradient is not finite"


def test_power_against_a_case_by_hand():
    # Ten pairs with an error of 1: an interval of +-2.262. A mean of 6: fresh intervals that meet the card's begin at
    # 6 - 2 * 2.262 = 1.475, which noise around 0 exceeds in 7 of 100.
    half = 2.262157
    assert verify.power({"n": 10, "low": 6 - half, "high": 6 + half}) == pytest.approx(0.9299, abs=1e-4)
    assert verify.power({"n": 10, "low": -6 - half, "high": -6 + half}) == pytest.approx(0.9299, abs=1e-4)
    assert verify.power({"n": 10, "low": 0.1, "high": 0.1 + 2 * half}) == 0.5  # the sign alone

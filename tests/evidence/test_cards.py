"""Ledger, cards and verify: pages agree with their data, what has no number says so, a number that moved is seen."""

import datetime
import json
from itertools import pairwise
from pathlib import Path

import pytest

from knep.cli import main
from knep.config import catalog
from knep.config.catalog import options
from knep.evidence import cards, ledger, readme_table, verify

ROOT = Path(__file__).parent.parent.parent
COMMITTED = ROOT / "docs" / "cards"


def record(trial, acc):
    curve = [{"step": 20, "val/acc": acc}]
    return {"status": "finished", "test/acc": acc, "val/acc": acc, "classes": 10, "cpu_seconds": 1.0, "peak_mib": 100.0,
            "curve": curve, "overrides": trial.made.overrides, "arm": trial.arm, "seed": trial.seed}  # fmt: skip


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
    for slot in cards.SLOTS:
        for option in options(slot):
            name, text = f"{slot}/{option}", (COMMITTED / slot / f"{option}.md").read_text()
            assert (name in known) != ("Not measured yet." in text), name
            assert (name in known) != (f"[{name}]" in contents), name


def test_no_card_is_without_data():
    assert cards.unmeasured() == []


def test_every_option_says_when_not_to_use_it_and_nothing_else_does():
    about = cards._about()
    assert {s: sorted(about[s]) for s in about} == {s: options(s) for s in cards.SLOTS}
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


def test_a_card_is_stale_as_soon_as_its_data_change(measured):
    folder = measured / "cards"
    assert cards.cards([str(folder)]) == 0
    assert not cards.outdated(folder)
    text = (folder / "clip" / "norm.md").read_text()
    assert "+2.00 [+2.00, +2.00]" in text
    assert "helps" in text
    assert "python train.py recipe=none" in text
    path = measured / "results" / "clip.json"
    path.write_text(path.read_text().replace('"mean": 0.02', '"mean": 0.03'))
    assert {p.name for p in cards.outdated(folder)} == {"norm.md", "README.md"}
    path.unlink()
    assert len(cards.outdated(folder)) == len(options("clip")) + 1
    assert len(cards.unmeasured()) == sum(len(options(slot)) for slot in cards.SLOTS)


def test_ls_shows_the_headline_number(measured, capsys):
    main.main(["ls", "clip"])
    assert "digits/mlp +2.00 [+2.00, +2.00] n=6" in capsys.readouterr().out


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (0.002, 0), (-0.05, 1), (0.05, 1)])
def test_verify_fails_where_a_number_leaves_its_interval(measured, monkeypatch, capsys, shift, code):
    asked = []

    def run(trials, store, processes):
        asked.extend(trials)
        return said(trials, lambda t: steady(t) + shift * (t.arm == "norm"))

    monkeypatch.setattr(verify, "run_trials", run)
    assert verify.verify(["clip/norm"]) == code
    assert {t.seed for t in asked} == {6, 7}  # none that the card has seen
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
    best = "[`norm`](docs/cards/clip/norm.md) on digits/mlp: +2.00 [+2.00, +2.00], n = 6, helps"
    lines = page.read_text().splitlines()
    assert lines[0] == f"before {readme_table.START}"
    assert lines[-1] == f"{readme_table.END} after"
    assert len(lines) == 5
    assert lines[3].startswith(f"| `clip` | {len(options('clip')) - 1} | {best} | [`")
    assert readme_table.filled(page.read_text()) == page.read_text()
    results = measured / "results" / "clip.json"
    results.write_text(results.read_text().replace('"verdict": "helps"', '"verdict": "hurts"'))
    assert readme_table.filled(page.read_text()) != page.read_text()
    assert readme_table.filled("no marks") == "no marks"

"""`knep seeds` and `knep cards --readme`: what they keep, and how they refuse."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from knep.cli.main import main
from knep.config.compose import compose_config
from knep.engine.precision import precision
from knep.evidence import readme_table
from knep.evidence.seeds import hashed, weights
from knep.io.provenance import commit

PRECISION = precision("auto", "cpu")
QUICK = ["recipe=none", "trainer=cpu", "trainer.max_epochs=1", "data.limit=60", "data.batch_size=20", "threads=1"]


def test_seeds_keeps_its_runs_and_goes_on(tmp_path, capsys):
    out = tmp_path / "new" / "kept.json"
    main(["seeds", "--seeds", "1", "--out", str(out), *QUICK])
    first = json.loads(out.read_text())
    main(["seeds", *QUICK, "--seeds", "2", "--out", str(out)])
    second = json.loads(out.read_text())
    assert (first["n"], second["n"]) == (1, 2)
    assert second["runs"]["0"] == first["runs"]["0"]
    assert second["command"] == " ".join(["python train.py", *QUICK])
    assert capsys.readouterr().out.count("seed 0: test") == 1
    assert (second["tested"], second["torch"], second["precision"]) == ("last epoch", version("torch"), PRECISION)
    assert second["commit"] == (commit() or None)


EVIDENCE = sorted((Path(__file__).parent.parent / "docs" / "evidence").glob("*.json"))


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_stored_runs_are_those_that_their_command_means_today(path):
    kept = json.loads(path.read_text())
    overrides = kept["command"].removeprefix("python train.py ").split()
    runs = kept["runs"]
    assert [int(seed) for seed in runs] == list(range(kept["n"]))
    assert len({run["config_hash"] for run in runs.values()}) == kept["n"]
    last = str(kept["n"] - 1)
    assert {seed: runs[seed]["config_hash"] for seed in ("0", last)} == {
        seed: hashed(overrides, int(seed)) for seed in ("0", last)
    }
    assert kept["tested"] == weights(compose_config(overrides).choices)
    assert {"commit", "torch", "precision"} <= kept.keys()  # None where nobody wrote it down


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seeds", "--seeds", "0"], "--seeds=0 must be at least 1"),
        (["seeds", "--processes", "0"], "--processes=0 must be at least 1"),
        (["seeds", "optimizer.lrr=1"], "there is no key optimizer.lrr: did you mean"),
        (["seeds", "--out", "foreign"], "--out=foreign holds no runs of earlier seeds"),
        (["seeds", "--out", "foreign/kept.json"], "--out=foreign/kept.json cannot be written"),
        (["cards", "--write"], "--write goes with --readme"),
        (["cards", "folder", "--readme"], "folder: --readme takes no folder"),
    ],
)
def test_bad_words_are_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").write_text("[1, 2]")
    with pytest.raises(SystemExit) as stop:
        main(words)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f"knep: {said}")
    assert err.count("\n") == 1
    assert (tmp_path / "foreign").read_text() == "[1, 2]"


def test_a_run_that_fails_ends_the_seeds(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["seeds", "--seeds", "1", *QUICK, "optimizer=momentum", "optimizer.lr=3e38"])
    assert stop.value.code == 1
    assert "knep: seed 0 ended with exit code 1: " in capsys.readouterr().err


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with a recipe, its evidence, and a README whose tables are empty."""
    (tmp_path / "docs" / "evidence").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- slots -->\n<!-- /slots -->\n<!-- evidence -->\n<!-- /evidence -->\nend\n")
    measured = {"command": "python train.py", "n": 3, "test_acc_mean": 0.5, "test_acc_std": 0.1, "seconds_mean": 6}
    measured |= {"tested": "last epoch", "commit": "abc", "torch": "2.0", "precision": None}
    (tmp_path / "docs" / "evidence" / "mine.json").write_text(json.dumps(measured))
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text("# Mine.\n#\n#\ndefaults: []\n")
    monkeypatch.setattr(readme_table, "CONF", tmp_path / "conf")
    monkeypatch.setattr(readme_table, "__file__", str(tmp_path / "knep" / "evidence" / "readme_table.py"))
    return tmp_path


def test_readme_names_what_is_out_of_date_and_writes_it(clone, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["cards", "--readme"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "knep: README.md, mine.yaml out of date: knep cards --readme --write\n"
    main(["cards", "--readme", "--write"])
    assert (
        "| `python train.py` | 3 | 50.00% ± 10.00% | last epoch | 6 | abc, 2.0, unknown |"
        in (clone / "README.md").read_text()
    )
    head = (clone / "conf" / "recipe" / "mine.yaml").read_text().splitlines()[2]
    assert head == "# python train.py: test accuracy 50.00 % ± 10.00 % (n = 3, 0.1 min)."
    main(["cards", "--readme"])


def test_readme_is_refused_outside_of_a_clone(clone, capsys):
    (clone / "README.md").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["cards", "--readme"])
    assert stop.value.code == 2
    assert "knep: knep cards --readme fills README.md and the recipes' heads of a clone" in capsys.readouterr().err

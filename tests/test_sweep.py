"""A sweep goes on past a job that fails, says what became of each, and does only what is missing when asked again."""

import csv
import signal
import sys

import pytest

from knep.cli.train import main
from knep.config.schema import ResumeConfig
from knep.engine import fit as member
from knep.errors import InputError
from knep.io.run_folder import read_summary, write_summary
from knep.run import report
from knep.run.resume import resumes
from knep.run.sweep import Outcomes
from tests.exhaustive import resume_matrix as matrix

QUICK = ["trainer=cpu", "trainer.max_epochs=1", "data.limit=60", "data.batch_size=15", "progress=false", "threads=1"]


def sweep(folder, *arguments):
    """The exit code of a sweep in `folder`, and its table."""
    code = 0
    try:
        main(["-m", *QUICK, *arguments, f"hydra.sweep.dir={folder}"])
    except SystemExit as ended:
        code = ended.code
    return code, list(csv.DictReader((folder / "sweep.csv").open()))


@pytest.fixture
def fits(monkeypatch):
    """The seeds of the runs that are fitted, in order; `errors` maps a seed to what its fit raises."""
    seen, errors, fit = [], {}, member.fit_member

    def noted(facts, data, folder, seed, *more, **named):
        seen.append(seed)
        if seed in errors:
            raise errors[seed]
        return fit(facts, data, folder, seed, *more, **named)

    monkeypatch.setattr(member, "fit_member", noted)
    return seen, errors


def test_failed_jobs_end_no_others_and_are_all_that_runs_again(tmp_path, fits, capsys):
    seen, errors = fits
    errors.update({1: ZeroDivisionError("by zero"), 2: InputError("cannot be"), 3: MemoryError("none left")})
    code, rows = sweep(tmp_path, "seed=0,1,2,3,4")
    assert code == 1
    assert [r["status"] for r in rows] == ["finished", "failed", "refused", "failed", "finished"]
    assert [r["overrides"] for r in rows] == [f"seed={i}" for i in range(5)]
    assert rows[1]["reason"] == "ZeroDivisionError: by zero"
    assert float(rows[0]["val/loss"]) == read_summary(tmp_path / "0")["val/loss"]
    said = capsys.readouterr()
    assert "Traceback" in said.err
    assert "3 of 5 jobs did not end; the same command again runs only those" in said.out
    assert not (tmp_path / "2").exists()  # refused: nothing was trained
    seen.clear()
    errors.clear()
    code, again = sweep(tmp_path, "seed=0,1,2,3,4")
    assert (code, seen) == (0, [1, 2, 3])
    assert [r["status"] for r in again] == ["finished"] * 5
    assert [(r["val/loss"], r["folder"]) for r in again][::4] == [(r["val/loss"], r["folder"]) for r in rows][::4]
    seen.clear()
    sweep(tmp_path, "seed=0", "resume=false")
    assert seen == [0]


def test_a_job_that_ends_in_nan_has_failed(tmp_path, monkeypatch):
    nan = {"status": "finished", "val/loss": float("nan"), "val/acc": 0.1}
    monkeypatch.setattr(report, "after", lambda *_: nan)
    code, rows = sweep(tmp_path, "seed=0,1")
    assert code == 1
    assert [(r["status"], r["reason"]) for r in rows] == [("failed", "val/loss is nan")] * 2


def test_a_stopped_sweep_goes_on_inside_the_run_that_was_stopped(tmp_path, monkeypatch):
    build = member.build_trainer
    strikes = iter([None, matrix.Strike(3, signal.SIGTERM)])

    def built(*args):
        strike = next(strikes, None)
        args[4].extend([strike] if strike else [])
        return build(*args)

    monkeypatch.setattr(member, "build_trainer", built)
    code, rows = sweep(tmp_path / "outputs", "seed=0,1,2")
    assert code == 143
    assert [r["status"] for r in rows] == ["finished", "interrupted", "not begun"]
    code, rows = sweep(tmp_path / "outputs", "seed=0,1,2")
    assert code == 0
    assert [r["status"] for r in rows] == ["finished"] * 3
    monkeypatch.undo()
    sweep(tmp_path / "whole", "seed=1,2")
    a, b = (read_summary(tmp_path / place) for place in ("outputs/1", "whole/0"))
    timed = ("seconds", "samples_per_second")
    assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def test_one_run_goes_on_in_its_own_folder_or_starts_afresh(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    once = [*QUICK, "resume=auto"]
    main(once)
    first = next(tmp_path.rglob("summary.json")).parent
    assert "going on" not in capsys.readouterr().out
    write_summary(first, read_summary(first) | {"status": "running"})  # as a kill leaves it
    main([*once, "seed=1", "name=other"])  # a folder of its own, also within the same second
    assert "going on" not in capsys.readouterr().out
    main(once)
    assert f"resume=auto: going on with {first}\n" in capsys.readouterr().out
    assert read_summary(first)["status"] == "finished"
    assert len(list(tmp_path.rglob("summary.json"))) == 2
    main([*once, "resume=false"])
    assert len(list(tmp_path.rglob("summary.json"))) == 3


def test_damaged_runs_are_passed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(QUICK)
    first = next(tmp_path.rglob("summary.json")).parent
    write_summary(first, read_summary(first) | {"status": "running"})
    for path in (first / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    main([*QUICK, "resume=auto"])
    said = capsys.readouterr()
    assert "no whole checkpoint is left" in said.err
    assert "going on" not in said.out


def test_when_a_run_looks_for_an_earlier_one(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    unset = ResumeConfig()
    assert [resumes(unset, sweep) for sweep in (True, False)] == [True, False]
    assert not resumes(ResumeConfig(resume=False), sweep=True)
    assert not resumes(ResumeConfig("outputs/x", "auto"), sweep=False)
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert resumes(unset, sweep=False)
    with pytest.raises(InputError, match="resume=maybe is not known"):
        resumes(ResumeConfig(resume="maybe"), sweep=False)


def test_a_module_that_no_import_statement_names_is_of_the_run_too(tmp_path, monkeypatch, fits, capsys):
    seen, _ = fits
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_by_name.py").write_text(
        "import importlib\n\n\ndef build(num_classes, in_channels, image_size):\n"
        "    parts = importlib.import_module('_'.join(['parts', 'by', 'name']))\n"
        "    return parts.build(num_classes, in_channels * image_size**2)\n"
    )
    parts = tmp_path / "parts_by_name.py"
    text = "from torch import nn\n\n\ndef build(classes, size):\n    return nn.Sequential(nn.Flatten(), {})\n"
    lines = ["seed=0", "recipe=none", "scaling=unit", "model=import", "model.path=nets_by_name:build", "resume=auto"]
    for layers, fitted in (
        ("nn.Linear(size, classes)", [0]),
        ("nn.Linear(size, classes)", []),
        ("nn.LazyLinear(classes), nn.ReLU()", [0]),
    ):
        parts.write_text(text.format(layers))
        for name in ("nets_by_name", "parts_by_name"):
            sys.modules.pop(name, None)
        seen.clear()
        sweep(tmp_path / "sweep", *lines)
        assert seen == fitted, capsys.readouterr()
    assert "parts_by_name" in read_summary(tmp_path / "sweep" / "0")["modules"]


def test_the_table_has_the_metric_of_the_task(tmp_path, capsys):
    numbers = Outcomes(tmp_path, frozenset())
    with numbers.open():
        for k, rmse in enumerate((2.5, 1.5)):
            end = {"status": "finished", "val/loss": 1.0, "val/rmse": rmse}
            numbers.take(k, [f"seed={k}"], tmp_path, lambda told, end=end: end)
        numbers.tell()
    head, *rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert head == "job,overrides,status,val/loss,val/rmse,folder,reason"
    assert [row.split(",")[4] for row in rows] == ["2.5", "1.5"]
    assert "val/rmse" in capsys.readouterr().out

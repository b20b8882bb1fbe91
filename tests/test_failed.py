"""A run that begins and cannot go on: one line, exit code 1, a summary that says so."""

import errno
import json

import pytest

from knep.cli.train import main
from knep.errors import InputError, RunFailed
from knep.io import run_folder
from knep.io.run_folder import failures_told, read_summary, write_summary
from knep.run import report

QUICK = ["trainer=cpu", "trainer.max_epochs=1", "data.limit=60", "data.batch_size=30", "progress=false", "threads=1"]


def failing(monkeypatch, error):
    def after(*_):
        raise error

    monkeypatch.setattr(report, "after", after)


def test_a_run_that_cannot_go_on_is_one_line_and_code_1(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, RunFailed("the loss is not\n finite"))
    with pytest.raises(SystemExit) as ended:
        main([*QUICK, f"hydra.run.dir={tmp_path}/run"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "knep: the loss is not finite\n"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", "the loss is not finite")
    assert set(summary) == {"status", "reason", "seed", "config_hash", "code_hash"}


def test_a_crash_leaves_its_reason_before_the_traceback(tmp_path, monkeypatch):
    failing(monkeypatch, ZeroDivisionError("by zero"))
    with pytest.raises(ZeroDivisionError):
        main([*QUICK, f"hydra.run.dir={tmp_path}/run"])
    summary = read_summary(tmp_path / "run")
    assert (summary["status"], summary["reason"]) == ("failed", "ZeroDivisionError: by zero")


def test_while_it_runs_the_summary_says_so(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "before", lambda *_: seen.append(read_summary(tmp_path / "run")["status"]) or [])
    main([*QUICK, f"hydra.run.dir={tmp_path}/run"])
    assert seen == ["running"]
    assert read_summary(tmp_path / "run")["status"] == "finished"


def test_refused_input_leaves_the_earlier_summary(tmp_path):
    @failures_told(tmp_path, {})
    def refused():
        write_summary(tmp_path, {"status": "running"})
        raise InputError("no")

    write_summary(tmp_path, {"status": "finished"})
    with pytest.raises(InputError):
        refused()
    assert read_summary(tmp_path) == {"status": "finished"}


def test_the_first_full_disk_is_the_reason_whatever_followed(tmp_path):
    @failures_told(tmp_path, {})
    def fails_twice():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "events")
        finally:
            raise RuntimeError("the logger is closed")

    with pytest.raises(RunFailed, match="events cannot be written"):
        fails_twice()
    assert read_summary(tmp_path)["reason"].startswith("events cannot be written (No space left on device)")


def test_no_room_for_the_summary_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_folder, "write_atomic", full)
    with pytest.raises(RunFailed, match="stopped"), failures_told(tmp_path, {}):
        raise RunFailed("stopped")


def test_a_folder_that_is_gone_is_the_reason(tmp_path):
    with pytest.raises(RunFailed, match="was removed"), failures_told(tmp_path / "gone", {}):
        raise RunFailed("stopped")
    assert not (tmp_path / "gone").exists()

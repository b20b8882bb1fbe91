"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP: a checkpoint, a true summary, an exit code; SLURM is asked for another turn."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from lightning.pytorch import Callback

from knep.cli.train import main
from knep.engine.loops import interrupts
from knep.engine.trainer import build_trainer
from knep.io.run_folder import read_summary
from knep.run import report
from tests.exhaustive import resume_matrix as matrix

QUICK = ["trainer=cpu", "trainer.max_epochs=2", "data.limit=60", "data.batch_size=15", "progress=false", "threads=1"]


@pytest.fixture
def struck(monkeypatch):
    """Runs `train.py` with these arguments and sends it a signal within its third batch; returns the exit code."""

    def strike(number, *arguments):
        def build(*args):
            args[4].append(matrix.Strike(3, number))
            return build_trainer(*args)

        monkeypatch.setattr("knep.engine.fit.build_trainer", build)
        monkeypatch.setattr(report, "after", lambda *_: pytest.fail("the test split would be read"))
        with pytest.raises(SystemExit) as ended:
            main([*QUICK, *arguments])
        monkeypatch.undo()
        return ended.value.code

    return strike


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that notes its arguments; the file with them."""
    noted, tool = tmp_path / "noted", tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {noted}\n[ ! -e {tmp_path}/broken ] || {{ echo no >&2; exit 1; }}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return noted


SLURM = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "j"}


@pytest.fixture
def slurm(monkeypatch):
    for name, value in {**SLURM, "SLURM_NNODES": "1", "SLURM_NODELIST": "here", "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 129}


@pytest.fixture
def listening():
    """Signals that are ignored stay so, and tests under nohup inherit an ignored SIGHUP."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), CODES.items())
@pytest.mark.usefixtures("listening")
def test_each_signal_saves_and_says_so(number, code, struck, tmp_path, capsys):
    folder, before = tmp_path / "run", signal.getsignal(signal.SIGUSR1)
    assert struck(number, f"hydra.run.dir={folder}") == code
    summary = read_summary(folder)
    assert (summary["status"], summary["signal"], summary["steps"]) == ("interrupted", number, 3)
    assert f"go on with: python train.py ckpt={folder}" in capsys.readouterr().out
    assert matrix.torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert not (folder / ".lock").exists()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_under_slurm_it_is_queued_once_by_us_alone(struck, scontrol, slurm, tmp_path, capsys):
    folder = tmp_path / "run"
    code = struck(signal.SIGUSR1, "slurm.requeue=true", f"hydra.run.dir={folder}")
    assert code == 143
    assert scontrol.read_text() == "requeue 17\n"
    assert not list(folder.rglob("hpc_ckpt*"))  # what Lightning's own handler leaves
    assert "SLURM job 17 is queued again" in capsys.readouterr().out


def test_ctrl_c_and_runs_that_did_not_ask_are_not_queued(struck, scontrol, slurm, tmp_path):
    struck(signal.SIGINT, "slurm.requeue=true", f"hydra.run.dir={tmp_path}/a")
    struck(signal.SIGUSR1, f"hydra.run.dir={tmp_path}/b")
    assert not scontrol.exists()


def test_a_task_of_an_array_queues_itself_alone_and_a_refusal_is_told(scontrol, slurm, monkeypatch, tmp_path, capsys):
    from knep.distributed.slurm import requeue

    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue()
    assert scontrol.read_text() == "requeue 15_2\n"
    (tmp_path / "broken").touch()
    assert not requeue()
    assert capsys.readouterr().err == "knep: scontrol requeue 15_2 failed (no): queue it by hand\n"


def test_the_second_signal_stops_at_once_but_an_echo_of_the_first_does_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGTERM)
    stop = interrupts.StopOnSignal()
    stop._ask(signal.SIGINT)
    now[0] += 0.1
    stop._ask(signal.SIGTERM)  # a launcher forwards what its group was sent
    assert stop.asked == signal.SIGINT
    now[0] += 1
    with pytest.raises(interrupts.Interrupted):
        stop._ask(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a third needs no Python
    signal.signal(signal.SIGTERM, before)


def test_outside_of_training_a_signal_is_told_too(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "after", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        main([*QUICK, f"hydra.run.dir={tmp_path}/run"])
    assert ended.value.code == 143
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["signal"]) == ("interrupted", 15)


def test_an_exception_in_a_fit_puts_the_handlers_back():
    before = signal.getsignal(signal.SIGUSR1)
    stop = interrupts.StopOnSignal()
    stop.on_fit_start(None, None)
    assert signal.getsignal(signal.SIGUSR1) == stop._ask
    stop.on_exception(None, None, OSError("the disk is full"))
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_reader_that_leaves_does_not_end_the_training(tmp_path):
    """As `| head -1` does, whose reading end is closed behind the first line."""
    lines = ["recipe=none", "data=digits", "model=mlp", "model.widths=[8]", *QUICK, f"hydra.run.dir={tmp_path}/run"]
    with subprocess.Popen([sys.executable, "-m", "knep.cli", "train", *lines], stdout=-1, stderr=-1) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        assert (process.wait(), error) == (0, b"")
    assert read_summary(tmp_path / "run")["status"] == "finished"


def test_a_folder_that_vanishes_in_mid_run_ends_it_in_one_line(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    class Vanish(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                shutil.rmtree(folder)

    monkeypatch.setattr(
        "knep.engine.fit.build_trainer", lambda *args: build_trainer(*args[:4], [*args[4], Vanish()], *args[5:])
    )
    with pytest.raises(SystemExit) as ended:
        main([*QUICK, "recipe=none", "data=digits", "model=mlp", "model.widths=[8]", f"hydra.run.dir={folder}"])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (1, 1)
    assert f"{folder} was removed" in error
    assert not folder.exists()

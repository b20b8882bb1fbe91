"""Two runs never share a folder; a lock whose process is gone is no lock."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from knep.cli.train import main
from knep.errors import InputError
from knep.io import lock
from knep.io.run_folder import discard, write_summary
from knep.run import report

ROOT = Path(__file__).parent.parent
QUICK = ["trainer=cpu", "trainer.max_epochs=1", "data.limit=60", "data.batch_size=30", "progress=false", "threads=1"]
HOLD = "import sys, pathlib, knep.io.lock as l\nwith l.held(pathlib.Path(sys.argv[1])):\n print(1, flush=True); input()"


@contextlib.contextmanager
def holder(folder):
    """Another process that has `folder`."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_run_is_refused_and_leaves_the_first_alone(tmp_path, capsys):
    folder = tmp_path / "run"
    with holder(folder) as process:
        write_summary(folder, {"status": "running"})
        (folder / "config.yaml").write_text("theirs")
        with pytest.raises(SystemExit) as ended:
            main([*QUICK, f"hydra.run.dir={folder}"])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert f"{folder} is in use by another run (process {process.pid} on " in said
        assert said.count("\n") == 1
        assert json.loads((folder / "summary.json").read_text()) == {"status": "running"}
        assert (folder / "config.yaml").read_text() == "theirs"
        process.communicate(b"\n")
    assert not (folder / ".lock").exists()
    main([*QUICK, f"hydra.run.dir={folder}"])
    assert not (folder / ".lock").exists()


def test_a_killed_owner_is_no_owner(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".lock").exists()
        with lock.held(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_every_way_out_gives_the_folder_back(tmp_path, monkeypatch):
    for error in (InputError("x"), ZeroDivisionError(), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)), lock.held(tmp_path):
            raise error
        assert not (tmp_path / ".lock").exists()


def test_within_one_process_too(tmp_path):
    with lock.held(tmp_path):
        with pytest.raises(InputError, match=f"process {os.getpid()} "), lock.held(tmp_path):
            pass
        child = os.fork()
        if not child:  # such as a data worker: it neither has the lock nor gives it back
            code = 1
            try:
                lock._held.clear()
                with lock.held(tmp_path):
                    pass
            except InputError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0


def test_discard_takes_nothing_but_an_empty_log(tmp_path):
    folder = tmp_path / "new" / "run"
    with lock.held(folder):
        discard(folder, tmp_path)
        assert folder.exists()
    (folder / "config.yaml").write_text("theirs")
    discard(folder, tmp_path)
    assert (folder / "config.yaml").exists()
    (folder / "config.yaml").unlink()
    (folder / "train.log").touch()
    discard(folder, tmp_path)
    assert not (tmp_path / "new").exists()
    assert tmp_path.exists()


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({}, False),
        ({"ticks": "1"}, True),  # the id was given to another process since
        ({"pid": 2**22 + 1}, True),
        ({"host": "elsewhere"}, False),  # nobody here can tell
    ],
)
def test_where_a_file_system_keeps_no_locks(change, free, tmp_path, monkeypatch):
    def none_kept(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none_kept)
    (tmp_path / ".lock").write_text(json.dumps(lock._about(os.getpid()) | change))
    if free:
        with lock.held(tmp_path):
            pass
    else:
        with pytest.raises(InputError, match="is in use"), lock.held(tmp_path):
            pass


def test_a_run_holds_its_folder(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "before", lambda *_: seen.append((tmp_path / "run" / ".lock").exists()) or [])
    main([*QUICK, f"hydra.run.dir={tmp_path}/run"])
    assert seen == [True]

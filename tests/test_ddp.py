"""Two processes: when one dies the other ends and names it, and torchrun goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.exhaustive.traces import difference, traces

ROOT = Path(__file__).parent.parent
LINES = [
    "recipe=none",
    "trainer=ddp_sim",
    "trainer.precision=32-true",
    "trainer.max_epochs=2",
    "dropout=standard",
    "averaging=ema",
    "data.limit=64",
    "data.batch_size=16",
    "log_every=1",
    "progress=false",
    "threads=1",
    "checkpoint.every=1",
]
# What `train.py` does, in a script that kills the process of one rank in the n-th call of a method.
SCRIPT = """
import os, signal
from knep.engine.module import Classifier
from knep.cli.train import main

rank, name, left = {rank}, "{name}", [{calls}]
method = getattr(Classifier, name)

def struck(self, *args, **kwargs):
    left[0] -= self.global_rank == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(self, *args, **kwargs)

setattr(Classifier, name, struck)
main()
"""


def script(folder, rank=-1, name="training_step", calls=1):
    path = folder / f"strike_{rank}_{name}.py"
    path.write_text(SCRIPT.format(rank=rank, name=name, calls=calls))
    return path


def run(command, folder, **more):
    """The process after its end, and how many seconds it took; whatever it started must be gone as well."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=900, cwd=folder, env=env, **more
    )
    return done, time.monotonic() - began


def left_over(mark):
    """Processes, zombies too, whose command holds `mark` or whose parent is this process."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if mark in command or (parent == str(os.getpid()) and not command):
            found.append(command)
    return found


def wait_until(true, seconds):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.2)
    return true()


@pytest.mark.parametrize(
    ("rank", "name", "calls"),
    [(1, "validation_step", 1), pytest.param(0, "training_step", 3, marks=pytest.mark.slow)],
)
def test_when_one_dies_the_other_says_so_and_ends(rank, name, calls, tmp_path):
    folder = tmp_path / "run"
    done, _ = run([script(tmp_path, rank, name, calls), *LINES, f"hydra.run.dir={folder}"], tmp_path)
    died = time.monotonic()
    assert done.returncode == (1 if rank else -signal.SIGKILL)
    assert wait_until(lambda: not left_over(str(folder)), 30), left_over(str(folder))
    assert time.monotonic() - died < 30
    said = [line for line in done.stderr.splitlines() if line.startswith("knep: ")]
    assert len(said) == 1, done.stderr
    assert f"rank {rank} of 2 died" in said[0]
    assert "Traceback" not in done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert f"rank {rank} of 2 died" in summary["reason"]
    assert not (folder / "checkpoints" / "final.ckpt").exists()


@pytest.mark.slow
def test_torchrun_goes_on_after_a_kill_and_ends_to_the_bit_where_it_would_have(tmp_path):
    whole = tmp_path / "whole"
    done, _ = run([script(tmp_path), *LINES, f"hydra.run.dir={whole}"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sync_dist" not in done.stderr  # Lightning's advice on sums that are added up already
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    struck = [script(tmp_path, 1, "training_step", 6), *LINES, "resume=auto"]
    done, _ = run([*command, *struck], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folders = [path.parent for path in (tmp_path / "outputs").rglob("config.yaml")]
    assert len(folders) == 1
    # torchrun looks for deaths itself: where it ends the other process first, the line that names one is its own.
    theirs = ("(exitcode: -9) local_rank: 1", "Signal 9 (SIGKILL) received")
    assert done.stderr.count("rank 1 of 2 died") == 1 or any(line in done.stderr for line in theirs)
    assert done.stderr.count("rank 1 of 2 died") <= 1
    assert difference(traces(whole), traces(folders[0])) == "identical"

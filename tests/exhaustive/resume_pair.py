"""Two processes, of which one is killed: both are started again, and the run is compared with one that never stopped.

Run as a script by itself, it is `train.py`, but kills the process of rank 1 in the training step that `STRIKE` says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.exhaustive.traces import difference, traces

ROOT = Path(__file__).resolve().parents[2]
STRIKE = "KNEP_STRIKE"
# What keeps state, and draws numbers, in each process.
LINES = ("trainer=ddp_sim", "dropout=standard", "augment=shift", "averaging=ema", "scheduler=plateau", "norm=group")


def _run(lines: Sequence[str], folder: Path, step: int = 0) -> str:
    """ "" for a run that ended, "killed" for one of which rank 1 was, or the last line of an error."""
    environment = os.environ | {STRIKE: str(step), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *lines, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if not done.returncode:
        return ""
    lost = done.returncode == 1 and "rank 1 of 2 died (killed by SIGKILL)" in done.stderr
    return "killed" if lost else f"fails: {done.stderr.strip().splitlines()[-1:]}"


def try_pair(lines: Sequence[str], step: int, every: int | None, place: Path, position: str) -> str:
    """What became of a run that was killed in a training step and gone on with; every: as `checkpoint.every`."""
    whole, parts = place / f"whole_{position}", place / f"parts_{position}"
    outcome = _run(lines, whole)
    if outcome:
        return outcome
    saved = [f"checkpoint.every={every}"] if every else []
    outcome = _run([*lines, *saved], parts, step)
    if outcome != "killed":
        return outcome or "fails: was not killed"
    return _run([f"ckpt={parts}"], parts) or difference(traces(whole), traces(parts))


def _struck() -> None:
    from knep.cli.train import main
    from knep.engine.module import Classifier

    step, left = Classifier.training_step, [int(os.environ[STRIKE])]

    def counted(self: Classifier, batch: Any, batch_idx: int) -> Any:
        left[0] -= self.global_rank == 1
        if self.global_rank == 1 and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)

    Classifier.training_step = counted  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    _struck()

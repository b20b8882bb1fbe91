"""SLURM: a job that is told to stop asks to be queued again. Lightning's own way of doing so is switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def under_slurm() -> bool:
    """Whether this process is part of a SLURM job."""
    return "SLURM_JOB_ID" in os.environ


def environment() -> list[Any]:
    """Lightning's plugin for processes that srun started; else nothing. Signals are left to `interrupts`."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]


def requeue() -> bool:
    """Asks SLURM to queue this job again, with a line on how that went: whether SLURM agreed."""
    job = _job()
    if job is None:
        print("knep: slurm.requeue=true, but this is no SLURM job: nothing is queued again", file=sys.stderr)
        return False
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        failure = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        print(f"knep: scontrol requeue {job} failed ({' '.join(failure.split())}): queue it by hand", file=sys.stderr)
        return False
    print(f"knep: SLURM job {job} is queued again, and will go on from here")
    return True


def _job() -> str | None:
    """The id of this job; of an array, this task's alone."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")

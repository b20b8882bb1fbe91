"""A finished run to start from: trained once, copied and then spoilt."""

from __future__ import annotations

import atexit
import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .attack import Place

SMALL = ["recipe=none", "trainer=cpu", "trainer.max_epochs=1", "data.limit=100", "data.batch_size=50", "threads=1"]


@cache
def template() -> Path:
    """A run of one epoch on a hundred digits."""
    from knep.cli.train import main

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        main([*SMALL, "progress=false", f"hydra.run.dir={folder}/run"])
    return folder / "run"


def a_run(place: Place) -> Path:
    """A copy of the template in the place, named `run`."""
    return shutil.copytree(template(), place.work / "run")


def spoilt(place: Place, change: Callable[[dict[str, Any]], Any], name: str = "final.ckpt") -> list[str]:
    """A run whose checkpoint's content `change` edits, or replaces by what it returns; saved without a checksum."""
    run = a_run(place)
    path = run / "checkpoints" / name
    state = torch.load(path, weights_only=True)
    made = change(state)
    torch.save(state if made is None else made, path)
    return [str(run)]


def resumable(place: Place, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    """The same for the checkpoint that a run goes on from, and the arguments that make it go on."""
    run = spoilt(place, change, "last.ckpt")
    (Path(run[0]) / "checkpoints" / "best.ckpt").unlink()
    return [*run, "trainer.max_epochs=2"]

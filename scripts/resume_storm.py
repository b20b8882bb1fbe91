"""One run with everything on, killed at random points of its steps, validations and checkpoints, again and again."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import resume_matrix as matrix
from lightning.pytorch import Callback
from traces import difference, traces

# All that keeps state at once, on images that two processes decode; saved every other step.
EVERYTHING = [
    "augment=mixup",
    "norm=batch",
    "dropout=standard",
    "optimizer=adamw",
    "clip=adaptive",
    "scheduler=plateau",
    "regularization=elastic",
    "averaging=ema",
    "stopping=early",
    "accumulate=2",
    "checkpoint.every=2",
]
LONGEST = 60  # hooks that a life may last: about ten batches


class StrikeAnywhere(Callback):
    """Kills this process in the n-th of the hooks below, wherever in a step, a validation or a save that is."""

    def __init__(self, n: int) -> None:
        self._left = n

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)

    on_train_batch_start = on_train_batch_end = on_validation_batch_end = _count  # type: ignore[assignment]
    on_before_backward = on_after_backward = on_before_optimizer_step = _count  # type: ignore[assignment]
    on_train_epoch_end = on_validation_start = on_save_checkpoint = _count  # type: ignore[assignment]


def storm(kills: int, seed: int = 0) -> Iterator[tuple[str, int, str]]:
    """Runs until `kills` are done: (name, kills of this run, what came of it) for each run."""
    draw, done, number = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        lines = [*EVERYTHING, *matrix.image_folder(place / "images")]
        outcome = matrix.in_child(lines, place / "whole")
        if outcome:
            yield "the run that is left alone", 0, outcome
            return
        whole = traces(place / "whole")
        while done < kills:
            number += 1
            lives, outcome = _one(lines, place / f"parts_{number}", draw, kills - done)
            done += lives
            yield f"run {number}", lives, outcome or difference(whole, traces(place / f"parts_{number}"))


def _one(lines: list[str], folder: Path, draw: random.Random, most: int) -> tuple[int, str]:
    """(kills, "" or the line of an error) of one run that is killed at most so often, and then ends."""
    for kills in range(most + 1):
        strike = StrikeAnywhere(draw.randrange(1, LONGEST)) if kills < most else None
        begun = any((folder / "checkpoints").glob("*.ckpt"))
        outcome = matrix.in_child(lines, folder, strike, resume=begun)
        if outcome != "killed":
            return kills, outcome
    return most, "fails: killed by somebody else"

"""Kills runs with SIGKILL, resumes them, and compares with the run that never stopped, to the bit.

Rows: every option of the slots that keep state from step to step. Columns: where the run was killed: at the start of an
epoch, inside one, inside an accumulation window. Compared: the final and the best weights, everything in last.ckpt
(optimizer, scheduler, averages, callbacks, counters), metrics.csv.

`python scripts/resume_matrix.py` prints option x position: identical, refused (with the reason), or what differs, and
by how much; exit code 1 where anything differs. --every n takes each n-th row, --limit n the first n of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from knep.compose import compose_config
from knep.errors import InputError
from knep.fit import about
from knep.listing import options
from knep.member import fit_member
from knep.safe import instantiate
from knep.train import hush

SLOTS = ("optimizer", "scheduler", "averaging", "stopping", "dropout", "augment", "regularization", "norm")
POSITIONS = ("epoch", "inside", "window")
BATCHES, EPOCHS, WINDOW = 7, 3, 3
BASE = (
    "recipe=none",
    "trainer=cpu",
    "trainer.precision=32-true",
    f"trainer.max_epochs={EPOCHS}",
    "model=cnn",
    "data.limit=105",
    "data.batch_size=15",
    "optimizer.lr=0.003",
    "log_every=1",
    "progress=false",
    "threads=1",
)


class Strike(Callback):
    """Sends this process a signal within the given batch of the run, counted from 1."""

    def __init__(self, batch: int, number: int) -> None:
        self._batch, self._number = batch, number

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self._batch:
            os.kill(os.getpid(), self._number)


def fit(lines: Sequence[str], folder: Path, strikes: Sequence[Callback] = (), resume: bool = False) -> int:
    """Trains what the override lines say in `folder`; returns the signal that stopped it, or 0."""
    hush()
    config = compose_config([*BASE, *lines]).config
    if resume:
        config["ckpt"] = str(folder)
    data = instantiate(config["data"])
    data.prepare()
    return fit_member(about(config, data), data, folder, config["seed"], strikes).interrupted


def in_child(lines: Sequence[str], folder: Path, strike: Callback | None = None, resume: bool = False) -> str:
    """`fit` in a process of its own: "" for a fit that ended, "killed", or the line of an error."""
    said = folder.with_suffix(".said")
    said.write_text("")
    child = os.fork()
    if not child:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                fit(lines, folder, [strike] if strike else [], resume)
            code = 0
        except BaseException as error:
            said.write_text(f"{'refused' if isinstance(error, InputError) else 'fails'}: {error}"[:300])
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else said.read_text()


def _leaves(value: Any, folder: Path, path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested plain data as (path, leaf), with the run folder's own name left out."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _leaves(v, folder, f"{path}/{k}".replace(str(folder), ""))
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from _leaves(v, folder, f"{path}/{i}")
    else:
        yield path, value.replace(str(folder), "") if isinstance(value, str) else value


def traces(folder: Path) -> dict[str, Any]:
    """All that a run left that must not depend on interruptions: path -> tensor, number or text."""
    kept: dict[str, Any] = {"metrics.csv": (folder / "metrics.csv").read_text()}
    for name in ("final", "best", "last"):
        state = torch.load(folder / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True)
        state.pop("knep")  # the config, in which `ckpt` differs
        kept.update(_leaves(state, folder.resolve(), name))
    return kept


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """ "identical", or the first trace that differs and by how much."""
    for path in dict.fromkeys([*a, *b]):
        if path not in a or path not in b:
            return f"differs: {path} is in one only"
        x, y = a[path], b[path]
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if x.shape != y.shape or not torch.equal(x, y):
                far = (x.double() - y.double()).abs().max().item() if x.shape == y.shape else float("inf")
                return f"differs by {far:.3g}: {path}"
        elif x != y:
            return f"differs: {path}" + (f", {x} and {y}" if len(str(x)) < 40 else "")
    return "identical"


def strike_at(position: str, draw: random.Random) -> int:
    """The batch in which a run is killed: the first of an epoch, one inside, or one inside a window."""
    epoch = draw.randrange(1, EPOCHS) * BATCHES
    if position == "epoch":
        return epoch + 1
    inside = draw.randrange(2, BATCHES) if position == "inside" else draw.choice([5, 6])
    return epoch + inside


def try_row(row: str, position: str, place: Path) -> str:
    """What became of one option killed at one position."""
    lines = [row] + ([f"accumulate={WINDOW}"] if position == "window" else [])
    whole, parts = place / "whole", place / "parts"
    outcome = in_child(lines, whole)
    if outcome:
        return outcome
    often = [] if position == "epoch" else ["checkpoint.every=1"]
    strike = Strike(strike_at(position, random.Random(f"{row} {position}")), signal.SIGKILL)
    outcome = in_child([*lines, *often], parts, strike)
    if outcome != "killed":
        return outcome or "fails: was not killed"
    outcome = in_child([*lines, *often], parts, resume=True)
    return outcome or difference(traces(whole), traces(parts))


def rows() -> list[str]:
    """`slot=option` for every option of the slots that keep state."""
    return [f"{slot}={name}" for slot in SLOTS for name in options(slot)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each n-th row")
    parser.add_argument("--limit", type=int, default=None, help="take so many rows at most")
    parser.add_argument("--positions", nargs="+", default=POSITIONS, choices=POSITIONS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = {"identical": 0, "refused": 0, "differs": 0, "fails": 0}
    for row in rows()[:: args.every][: args.limit]:
        for position in args.positions:
            with tempfile.TemporaryDirectory() as place:
                outcome = try_row(row, position, Path(place))
            counts[outcome.replace(":", " ").split()[0]] += 1
            print(f"{row:32} {position:8} {outcome}", flush=True)
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    sys.exit(1 if counts["differs"] or counts["fails"] else 0)


if __name__ == "__main__":
    main()

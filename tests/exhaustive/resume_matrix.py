"""Kills runs with SIGKILL, resumes them, and compares with the run that never stopped, to the bit.

Rows: every option of every slot, every recipe and model, the kinds of data, two processes. Columns: where the run was
killed: at the start of an epoch, inside one, inside an accumulation window. Compared: the final and the best weights,
everything in last.ckpt (optimizer, scheduler, averages, callbacks, counters), metrics.csv.

`python -m tests.exhaustive.resume_matrix` prints option x position: identical, refused (with the reason), or what
differs, and by how much; exit code 1 where anything differs. --every n takes each n-th row, --limit n the first n of
them, --rows those that start so; --storm n kills one run with everything on n times at random points, several times in
a row.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import functools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from knep.config.catalog import SLOTS, options
from knep.config.compose import compose_config
from knep.config.instantiate import allow_typed, instantiate
from knep.config.schema import RunConfig
from knep.engine.fit import fit_member
from knep.errors import InputError
from knep.run.run import hush
from scripts.clinic.cases.healthy import PUBLISHED
from tests.exhaustive.formats import FORMATS
from tests.exhaustive.pairs import LISTS
from tests.exhaustive.traces import difference, traces

POSITIONS = ("epoch", "inside", "window")
BATCHES, EPOCHS, WINDOW = 7, 3, 3
PAIR = "trainer=ddp_sim"
# Values of options that keep a state of their own.
VALUES = (
    "optimizer.wrap=[centralize,cautious,lookahead]",
    "averaging=ema averaging.decay=[0.9,0.99]",
    "averaging=ema averaging.warmup=power",
    "optimizer=muon optimizer.variant=normuon optimizer.coefficients=polar_express",
    "optimizer=muon optimizer.variant=adamuon",
)
PATIENCE = 900  # seconds that a run of 21 small batches may take before it counts as hanging, on a busy machine too
_SMALL = ("data=synthetic", "data.image_size=16", "data.images=140", "trainer.limit_val_batches=1")
# Of published recipes, whose nets and sizes are ImageNet's.
_OF = {
    **dict.fromkeys(("timm_a3", "torchvision_2021"), ("augment.random_resized_crop.size=16",)),
    "fastai_finetune": ("finetune=none",),
}
# Lines that a row needs beside its own: small models, and images where the option has none of its own.
BESIDE = {
    "averaging=ensemble": ("averaging.members=2",),
    "dropout=stochastic_depth": ("model=resnet", "model.width=0.5", "norm=batch"),
    **dict.fromkeys(
        (f"init={name}" for name in ("skipinit", "rezero", "layer_scale", "fixup")),
        ("model=resnet", "model.width=0.5", "norm=none"),
    ),
    "model=mlp": ("model.widths=[32,32]",),
    "model=resnet": ("model.width=0.5", "norm=batch"),
    "model=inception": ("model.width=0.25",),
    "model=torchvision": ("model.name=shufflenet_v2_x0_5", "data=synthetic", "data.image_size=32"),
    "model=import": ("model.path=torchvision.models:shufflenet_v2_x0_5", *_SMALL, "data.channels=3"),
    "data=fashion_mnist": ("trainer.limit_val_batches=1",),
    **{f"recipe={name}": _SMALL for name in options("recipe")},
    **{f"recipe={name}": (*_SMALL, "data.channels=3", "model=cnn", *_OF.get(name, ())) for name in PUBLISHED},
}
# Images to write for the rows whose data sets are files: enough for 105 of them after the validation split.
FILES = {f"data={name}": 400 if name == "cifar100" else 150 for name in FORMATS}
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


@functools.cache
def _composed(lines: tuple[str, ...]) -> dict[str, Any]:
    recipe = any(line.startswith("recipe=") for line in lines)
    base = [line for line in BASE if not (recipe and line.split("=")[0] in ("recipe", "model", "optimizer.lr"))]
    allow_typed(lines)
    return compose_config([*base, *lines]).config


def fit(
    lines: Sequence[str], folder: Path, strikes: Sequence[Callback] = (), resume: bool = False, every: Any = None
) -> int:
    """Trains what the override lines say in `folder`; returns the signal that stopped it, or 0.

    every: as `checkpoint.every`, unless the lines say it.
    """
    hush()
    config = copy.deepcopy(_composed(tuple(lines)))
    config["checkpoint"]["every"] = every or config["checkpoint"]["every"]
    if resume:
        config["ckpt"] = str(folder)
    data = instantiate(config["data"])
    data.prepare()
    seed = config["seed"]
    for i in range(members := config["averaging"].get("members", 1)):
        place = folder / f"member_{i}" if members > 1 else folder
        stopped = fit_member(RunConfig.of(config), data, place, seed + i, strikes).interrupted
        if stopped:
            return stopped
    return 0


def in_child(
    lines: Sequence[str], folder: Path, strike: Callback | None = None, resume: bool = False, every: Any = None
) -> str:
    """`fit` in a process of its own: "" for a fit that ended, "killed", or the line of an error."""
    _composed(tuple(lines))  # here, so that every child has it
    folder.parent.mkdir(parents=True, exist_ok=True)
    said = folder.with_suffix(".said")
    said.write_text("")
    child = os.fork()
    if not child:
        code = 1
        try:
            with said.open("a") as stacks, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                faulthandler.dump_traceback_later(PATIENCE - 5, file=stacks)
                fit(lines, folder, [strike] if strike else [], resume, every)
            code = 0
        except BaseException as error:
            said.write_text(f"{'refused' if isinstance(error, InputError) else 'fails'}: {error}"[:300])
        finally:
            os._exit(code)
    status = _wait(child)
    if status is None:
        return f"fails: hangs, {' '.join(said.read_text().split())[:1000]}"
    return "killed" if os.WIFSIGNALED(status) else said.read_text()


def _wait(child: int) -> int | None:
    """The exit status of a child; None for one that had to be ended."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def strike_at(position: str, draw: random.Random) -> int:
    """The batch in which a run is killed: the first of an epoch, one inside, or one inside a window."""
    epoch = draw.randrange(1, EPOCHS) * BATCHES
    if position == "epoch":
        return epoch + 1
    inside = draw.randrange(2, BATCHES) if position == "inside" else draw.choice([5, 6])
    return epoch + inside


def try_row(row: str, position: str, place: Path) -> str:
    """What became of one option killed at one position; two positions with the same lines share the whole run."""
    if row == PAIR:
        return _two_processes(position, place)
    lines = [*row.split(), *BESIDE.get(row, ()), *([f"accumulate={WINDOW}"] if position == "window" else [])]
    if row == "data=image_folder":
        lines += image_folder(place / "images")
    elif row in FILES:
        lines += [f"data.root={written(row, place / 'files')}"]
    whole, parts = place / ("whole_window" if position == "window" else "whole"), place / f"parts_{position}"
    try:
        outcome = "" if (whole / "metrics.csv").exists() else in_child(lines, whole)
        if outcome:
            return outcome
        every = None if position == "epoch" else 1
        strike = Strike(strike_at(position, random.Random(f"{row} {position}")), signal.SIGKILL)
        outcome = in_child(lines, parts, strike, every=every)
        if outcome != "killed":
            return outcome or "fails: was not killed"
        outcome = in_child(lines, parts, resume=True, every=every)
    except InputError as error:  # from composing, which is done here
        return f"refused: {error}"
    return outcome or difference(traces(whole), traces(parts))


def _two_processes(position: str, place: Path) -> str:
    from tests.exhaustive.resume_pair import LINES, try_pair

    lines = [*BASE, *LINES, "data.batch_size=14", *([f"accumulate={WINDOW}"] if position == "window" else [])]
    batch = strike_at(position, random.Random(f"{PAIR} {position}"))
    return try_pair(lines, batch, None if position == "epoch" else 1, place, position)


def image_folder(root: Path, size: int = 8) -> list[str]:
    """Writes two classes of noise, and returns the override lines that read them with two processes."""
    from torchvision.io import write_png

    noise = torch.Generator().manual_seed(0)
    for split, count in (("train", BATCHES * 16), ("test", 4), ("val", 8)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_png(torch.randint(0, 256, (3, size, size), generator=noise, dtype=torch.uint8), str(path))
    return ["data=image_folder", f"data.root={root}", f"data.size={size}", "data.workers=2"]


def written(row: str, root: Path) -> Path:
    """The folder with a small data set in the format of `row`, written where it is not there."""
    if not root.exists():
        FORMATS[row.removeprefix("data=")](root, FILES[row])
    return root


def rows() -> list[str]:
    """`slot=option` for every option of every slot, the recipes and models, each kind of data, and `VALUES`."""
    data = ["data=digits", "data=fashion_mnist", "data=image_folder", "data=synthetic", *FILES]
    names = {slot: options(slot) + LISTS.get(slot, []) for slot in (*SLOTS, "model", "recipe")}
    return [f"{slot}={name}" for slot, known in names.items() for name in known] + data + [*VALUES, PAIR]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each n-th row")
    parser.add_argument("--limit", type=int, default=None, help="take so many rows at most")
    parser.add_argument("--rows", nargs="+", default=[""], help="take the rows that start with one of these")
    parser.add_argument("--positions", nargs="+", default=POSITIONS, choices=POSITIONS)
    parser.add_argument("--storm", type=int, default=0, metavar="N", help="kill one run N times instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = {"identical": 0, "refused": 0, "differs": 0, "fails": 0}

    def note(row: str, position: str, outcome: str) -> None:
        counts[outcome.replace(":", " ").split()[0]] += 1
        print(f"{row:32} {position:8} {outcome}", flush=True)

    if args.storm:
        from tests.exhaustive.resume_storm import storm

        for _, name, kills, outcome in storm(args.storm):
            note(name, f"{kills} kills", outcome)
    else:
        chosen = [row for row in rows() if row.startswith(tuple(args.rows))]
        for row in chosen[:: args.every][: args.limit]:
            with tempfile.TemporaryDirectory() as place:
                for position in args.positions:
                    note(row, position, try_row(row, position, Path(place)))
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    sys.exit(1 if counts["differs"] or counts["fails"] else 0)


if __name__ == "__main__":
    main()

"""Kills whole runs of the command with SIGKILL, one to three times each, goes on, and compares all that they leave.

`python -m tests.exhaustive.resume_storm --runs 200` is the whole storm: 200 runs over every averaging, members and
stopping option, with intervals of checkpoints, accumulation, guards, schedules and optimizers with odd states drawn
beside. Each is killed within steps, validations, saves (between the bytes of a file, its sync and its renaming),
between two files, or in what follows training; or after any time. It goes on by `ckpt=` or by the same line again
(resume=auto). Compared with the run that was left alone, file by file: every tensor and number of every checkpoint,
metrics.csv, summary.json without times, TensorBoard's points and pictures, the config, and that no other file is left;
but not what the doctor notes, which begins to watch anew in each life. Prints a line per run and the count; exit code 1
where one is not identical. --seed draws others, --only 17 repeats one; a run takes about 6 s of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # so that no child has to
from lightning.pytorch import Callback
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import knep.engine.fit
import knep.run.report  # so that no child has to
from knep.cli.train import main as train
from knep.config.compose import compose_config
from knep.errors import InputError
from knep.io import checkpoint
from tests.exhaustive.traces import difference, left

BASE = (
    *("recipe=none", "trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=3", "threads=1", "progress=false"),
    *("data.limit=60", "data.batch_size=15", "optimizer.lr=0.003", "log_every=1", "resume=auto"),
)
# Every pair of these comes up in turn; where two contradict each other, the members are left out.
AVERAGING = ("none", "ema", "swa", "soup", "ensemble")
STOPPING = ("none", "early")
MEMBERS = (1, 2)
# Of these each run draws one; what contradicts the others is drawn again.
DRAWN = (
    ("", "checkpoint.every=1", "checkpoint.every=2", "checkpoint.every=3"),
    ("", "accumulate=3", "accumulate=epoch"),
    ("optimizer=adamw", "optimizer=sam", "optimizer=schedule_free", "optimizer=muon", "optimizer=momentum"),
    ("guard=stop", "guard=skip", "guard=rollback", "guard=none"),
    ("scheduler=none", "scheduler=plateau", "scheduler=one_cycle"),
    ("model=mlp model.widths=[8]", "model=mlp model.widths=[8,8] norm=batch dropout=standard", "model=cnn norm=batch"),
    ("", "augment=shift", "clip=norm", "regularization=max_norm"),
    ("", "", "lean=false", "callbacks=doctor", "trainer.max_steps=7", "trainer.check_val_every_n_epoch=2"),
)
PLACES = ("step", "validation", "save", "file", "end", "time")
PATIENCE = 300  # seconds after which a life counts as hanging, on a busy machine too

_AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Strike(Callback):
    """Counts what happens in this process by the place where it does, and ends it by SIGKILL at the n-th in one place.

    After the first final checkpoint everything is "end", until a member after it takes a step.
    """

    def __init__(self, folder: Path, place: str = "", n: int = 0) -> None:
        self.counts: dict[str, int] = dict.fromkeys(PLACES, 0)
        self._folder, self._place, self._left, self._ended = str(folder), place, n, False

    def count(self, place: str) -> None:
        self._ended = self._ended and place != "step"
        place = "end" if self._ended else place
        self.counts[place] += 1
        if place == self._place:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)

    def step(self, *_: Any) -> None:
        self.count("step")

    def validation(self, *_: Any) -> None:
        self.count("validation")

    on_train_batch_start = on_train_batch_end = on_before_backward = on_after_backward = step  # type: ignore[assignment]
    on_train_epoch_end = on_save_checkpoint = step  # type: ignore[assignment]
    on_validation_start = on_validation_batch_end = on_validation_end = validation  # type: ignore[assignment]

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Before a file in the run folder is opened, renamed or removed."""
        if event in _AUDITED and str(args[0]).startswith(self._folder):
            self._ended = self._ended or ".final.ckpt" in str(args[0])
            self.count("save" if "/checkpoints/" in str(args[0]) else "file")

    def listen(self) -> None:
        """For the rest of this process."""
        sys.addaudithook(self.audit)
        register_optimizer_step_pre_hook(self.step)
        register_optimizer_step_post_hook(self.step)
        self._before(os, "fsync")
        self._before(checkpoint._Noting, "write")
        build = knep.engine.fit.build_trainer
        knep.engine.fit.build_trainer = lambda *args: build(*args[:4], [*args[4], self], *args[5:])  # type: ignore[assignment]

    def _before(self, owner: Any, name: str) -> None:
        do: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any) -> Any:
            self.count("save")
            return do(*args)

        setattr(owner, name, counted)


def life(lines: Sequence[str], strike: Strike, said: Path, seconds: float = 0) -> str:
    """Runs the command in a process of its own: "" for one that ended well, "killed", or what went wrong.

    said: takes what it prints, and the counts of `strike` at its end; seconds: after which it is killed, 0 for never.
    """
    child = os.fork()
    if not child:
        with said.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os._exit(_lived(lines, strike, said))
    end = time.monotonic() + (seconds or PATIENCE)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return _ending(os.waitstatus_to_exitcode(status), said)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed" if seconds else "fails: hangs"


def _lived(lines: Sequence[str], strike: Strike, said: Path) -> int:
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False, buffering=1) for fd in (1, 2))  # noqa: SIM115
    code = 0
    try:
        strike.listen()
        train(list(lines))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 99
    said.with_suffix(".counts").write_text(json.dumps(strike.counts))
    return code


def _ending(code: int, said: Path) -> str:
    if code == -signal.SIGKILL:
        return "killed"
    lines = said.read_text(errors="replace").strip().splitlines() or ["nothing"]
    return "" if code == 0 else f"{'refused' if code == 2 else f'fails with {code}'}: {lines[-1][:200]}"


def option_sets(count: int, seed: int) -> Iterator[list[str]]:
    """Override lines: each averaging with each stopping and number of members in turn, the rest drawn."""
    turns = itertools.cycle(itertools.product(AVERAGING, STOPPING, MEMBERS))
    for i in range(count):
        draw = random.Random(f"{seed} {i}")
        averaging, stopping, members = next(turns)
        chosen = [f"averaging={averaging}", f"stopping={stopping}"]
        chosen += ["stopping.patience=1"] if stopping == "early" else []
        chosen += ["averaging.members=2"] if averaging == "ensemble" else []
        chosen += [f"trainer.members={members}"] if members > 1 and averaging != "ensemble" else []
        while True:
            lines = [*BASE, *chosen, *(word for options in DRAWN for word in draw.choice(options).split())]
            if {"scheduler=plateau", "trainer.check_val_every_n_epoch=2"} <= {*lines}:
                continue  # a plateau is looked for at the end of each epoch
            with contextlib.suppress(InputError):
                compose_config(lines)
                break
        yield lines


def storm(runs: int, seed: int = 0, only: int | None = None) -> Iterator[tuple[int, str, int, str]]:
    """(number, option lines, kills, "identical" or what differs) of each run; two runs share what they are held to."""
    for number, lines in enumerate(option_sets(-(-runs // 2), seed)):
        pair = [i for i in (2 * number, 2 * number + 1) if i < runs and only in (None, i)]
        if not pair:
            continue
        own = " ".join(line for line in lines if line not in BASE)
        with tempfile.TemporaryDirectory(prefix="storm") as place:
            whole = Path(place, "whole")
            began = time.monotonic()
            outcome = life([*lines, f"hydra.run.dir={whole}"], Strike(whole), Path(place, "whole.said"))
            seconds = time.monotonic() - began
            if outcome:
                yield from ((i, own, 0, f"left alone, it {outcome}") for i in pair)
                continue
            counts = json.loads(Path(place, "whole.counts").read_text())
            for i in pair:
                yield (
                    i,
                    own,
                    *_killed(lines, Path(place, f"parts_{i}"), counts, seconds, random.Random(f"{seed} run {i}")),
                )


def _killed(
    lines: Sequence[str], folder: Path, counts: dict[str, int], seconds: float, draw: random.Random
) -> tuple[int, str]:
    """(kills, outcome) of one run; counts, seconds: what happens where in a run that is left alone, and how long it
    takes."""
    said, kills, wanted = folder.with_suffix(".said"), 0, draw.choice((1, 2, 3))
    tries = 0
    while kills < wanted and tries < 9:
        tries += 1
        place = draw.choice([p for p in PLACES if p == "time" or counts[p]])
        strike = Strike(folder, place, draw.randint(1, max(counts[place], 1)))
        outcome = life(_again(lines, folder, draw), strike, said, draw.uniform(0.1, seconds) if place == "time" else 0)
        kills += outcome == "killed"
        if outcome not in ("", "killed"):
            return kills, outcome
        if not outcome:
            break
    outcome = life(_again(lines, folder, draw), Strike(folder), said)
    return kills, outcome or difference(left(folder.with_name("whole")), left(folder))


def _again(lines: Sequence[str], folder: Path, draw: random.Random) -> list[str]:
    """The line by which the run in `folder` is begun or gone on with."""
    begun = any(folder.glob("**/checkpoints/*.ckpt"))
    if begun and draw.random() < 0.5:
        return [f"ckpt={folder}"]
    return [*lines, f"hydra.run.dir={folder}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None, metavar="N", help="the run of this number alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    identical = done = kills = 0
    for number, own, killed, outcome in storm(args.runs, args.seed, args.only):
        done, kills, identical = done + 1, kills + killed, identical + (outcome == "identical")
        print(f"{number:4} {killed} kills  {outcome}  {own}", flush=True)
    print(f"{identical} of {done} identical, {kills} kills")
    sys.exit(identical < done)


if __name__ == "__main__":
    main()

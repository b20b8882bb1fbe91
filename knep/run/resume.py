"""`ckpt=` and `resume=auto`: going on with a run from its folder or a checkpoint file."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knep.config.command_line.aliases import check_length, path_typed, quoted, unquoted
from knep.config.instantiate import check_stored, only_read
from knep.config.schema import ResumeConfig, RunConfig, config_hash
from knep.errors import InputError
from knep.io.find_checkpoint import find_checkpoint, find_whole, newest_save, run_folder
from knep.io.run_folder import read_summary
from knep.io.untrusted_folder import check_folder, check_kind, read_lines
from knep.run.source_hash import code_hash
from knep.run.sweep import JOBS
from knep.utils.text import shown

_ENDED = ("finished", "stopped_early")


def expand_ckpt(arguments: list[str]) -> list[str]:
    """`ckpt=RUN` stands for the overrides of RUN and its folder; what is written beside it has the last word."""
    given = path_typed(arguments, "ckpt")
    if given is None:
        return arguments
    _check_there(given)
    folder = run_folder(given)
    if "${" in str(folder):
        raise InputError(f"ckpt={given} has ${{ in its name, which stands for another value: rename the folder")
    listed = folder / "overrides.txt"
    check_kind(listed)
    if not (Path(given).is_dir() and listed.is_file()):
        find_checkpoint(given)
    if not listed.is_file():  # before the folder is walked through, which may be any
        raise InputError(f"ckpt={given} lies in no run folder of knep: {listed} is missing")
    check_folder(folder)
    earlier = [line for line in read_lines(listed) if line and not line.startswith("ckpt=")]
    check_length(earlier, str(listed))
    check_stored(earlier, str(listed))
    placed = any(a.startswith("hydra.run.dir=") for a in arguments)
    place = [] if placed else [f"hydra.run.dir={quoted(str(folder))}"]
    return [*only_read(earlier, arguments), *arguments, *place]


def run_folders(arguments: list[str]) -> list[Path]:
    """The run folders that a command line names."""
    start = "hydra.run.dir="
    return [Path(unquoted(a.removeprefix(start))) for a in arguments if a.startswith(start)]


def check_ckpt(run: RunConfig) -> None:
    """Raises InputError where there is nothing at `ckpt` to go on from. Members that had saved nothing start anew."""
    ckpt = run.resume.ckpt
    if ckpt is None:
        return
    if run.members < 2:
        find_checkpoint(ckpt)
    elif (run_folder(ckpt) / "checkpoints").exists():
        raise InputError(f"ckpt={ckpt} is a run of one model, without members: start one with members anew")


def _check_there(given: str) -> None:
    """Raises InputError for a path that leads nowhere, or that cannot be looked at."""
    try:
        Path(given).stat()
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        what = "is missing" if missing else f"cannot be read ({error.strerror})"
        raise InputError(f"ckpt={given} {what}: give a run folder or a .ckpt file") from error


def resumes(asked: ResumeConfig, sweep: bool) -> bool:
    """Whether a run looks for an earlier one of its config. Raises InputError for another word than auto or false."""
    from knep.distributed.slurm import under_slurm

    wanted = asked.resume
    if wanted is not None and wanted is not False and wanted != "auto":
        place = f"ckpt={wanted} to go on with that run, or " if "/" in str(wanted) or Path(str(wanted)).exists() else ""
        known = "auto, false, or null (auto for sweeps and under SLURM)"
        raise InputError(f"resume={wanted} is not known: write {place}{known}")
    return asked.ckpt is None and (wanted == "auto" or (wanted is None and (sweep or under_slurm())))


def root_of(folder: Path) -> Path:
    """Where the other runs of a run's or a sweep's folder lie: outputs/ for one within it, else the folder itself."""
    outputs = Path("outputs").resolve()
    return outputs if folder.resolve().is_relative_to(outputs) else folder


Run = tuple[Path, dict[str, Any]]


def earlier_runs(config: Mapping[str, Any], root: Path, jobs_only: bool = False) -> list[Run]:
    """The runs of the same config and code under `root` with their summaries, the one that was saved last first.

    jobs_only: those that a sweep began. Where all that have the config are of other code, a line says so.
    """
    wanted = config_hash(config)
    found = [(path.parent, _summary_of(path.parent)) for path in root.rglob("summary.json")]
    found = [(folder, summary) for folder, summary in found if summary.get("config_hash") == wanted]
    found = [(folder, summary) for folder, summary in found if not jobs_only or _of_sweep(folder, root)]
    found = sorted(found, key=lambda run: newest_save(run[0]), reverse=True)
    same = [
        (folder, summary)
        for folder, summary in found
        if summary.get("code_hash") == code_hash(config, summary.get("modules", ()))
    ]
    if found and not same:
        folder, summary = found[0]
        came = "came from other code" if "code_hash" in summary else "does not say from which code it came"
        print(f"knep: {shown(folder)} has the same config, but {came}: not taken (ckpt=FOLDER goes on with one begun)")
    return same


def _of_sweep(folder: Path, root: Path) -> bool:
    """Whether a run lies in the folder of a sweep, at or under `root`."""
    places = [p for p in (folder, *folder.parents) if p == root or p.is_relative_to(root)]
    return any((place / name).exists() for place in places for name in ("multirun.yaml", "sweep.csv", JOBS))


def _summary_of(folder: Path) -> dict[str, Any]:
    """The summary of a run that nobody named: one that cannot be read is told, and left out."""
    try:
        return read_summary(folder)
    except InputError as error:
        print(f"knep: {error}", file=sys.stderr)
        return {}


def find_ended(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The summary of one of these runs that came to its end, with its folder; None where there is none."""
    for folder, summary in runs:
        loss = summary.get("val/loss")
        if summary.get("status") in _ENDED and isinstance(loss, float) and math.isfinite(loss):
            return summary | {"folder": str(folder)}
    return None


def find_begun(runs: Sequence[Run]) -> Path | None:
    """The folder of the first of these runs that has a whole checkpoint and no end, or None."""
    for folder, summary in runs:
        if summary.get("status") in _ENDED or not newest_save(folder):
            continue
        try:
            check_folder(folder)
            for place in sorted(folder.glob("member_*")) or [folder]:
                if newest_save(place):
                    find_whole(place, warn=False)
        except InputError as error:
            print(f"knep: resume=auto: {shown(str(error))}", file=sys.stderr)
            continue
        return folder
    return None

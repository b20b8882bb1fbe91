"""`ckpt=` and `resume=auto`: going on with a run from its folder or a checkpoint file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knep.errors import InputError
from knep.files import config_hash, read_summary
from knep.safe import check_stored, only_read
from knep.strangers import check_folder, read_lines
from knep.typed import path_typed, quoted

_ENDED = ("finished", "stopped_early")


def find_checkpoint(ckpt: str | Path) -> Path:
    """The newest checkpoint file that `ckpt` (a run folder or a file) means, whole or not.

    Raises InputError where there is none.
    """
    path = Path(ckpt)
    if path.is_dir():
        return _newest_first(path)[0]
    if not path.is_file():
        raise InputError(f"ckpt={ckpt} is missing: give a run folder or a .ckpt file")
    return path


def _newest_first(folder: Path) -> list[Path]:
    places = [folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")]
    odd = next((p for p in places if p.exists() and not p.is_file()), None)
    if odd is not None:
        raise InputError(f"{odd} is no file: move it away, then resume")
    found = [p for p in places if p.is_file()]
    if not found:
        raise InputError(f"ckpt={folder} has no checkpoints/last.ckpt to resume: give another run folder")
    return sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True)


def find_whole(ckpt: str | Path, warn: bool = True) -> Path:
    """The newest whole checkpoint of a run folder, with a line on the damaged ones; a file stands for itself.

    Raises InputError where none is whole.
    """
    from knep.checkpoint import damage  # brings torch, which `--cfg` and `--help` do without

    if not Path(ckpt).is_dir():
        return find_checkpoint(ckpt)
    wrong: list[str] = []
    for path in _newest_first(Path(ckpt)):
        what = damage(path)
        if what is None:
            if wrong and warn:
                print(f"knep: {', '.join(wrong)}: going on from {path.name}", file=sys.stderr)
            return path
        wrong.append(f"{path} {what}")
    raise InputError(f"{', '.join(wrong)}: no whole checkpoint is left to resume, start the run again without ckpt=")


def run_folder(ckpt: str | Path) -> Path:
    """The run folder that a checkpoint belongs to."""
    path = Path(ckpt)
    return path if path.is_dir() else path.parent.parent


def expand_ckpt(arguments: list[str]) -> list[str]:
    """`ckpt=RUN` stands for the overrides of RUN and its folder; what is written beside it has the last word."""
    given = path_typed(arguments, "ckpt")
    if given is None:
        return arguments
    _check_there(given)
    folder = run_folder(given)
    if "${" in str(folder):
        raise InputError(f"ckpt={given} has ${{ in its name, which stands for another value: rename the folder")
    members = sorted(folder.glob("member_*"))
    if not members:
        find_checkpoint(given)
    listed = folder / "overrides.txt"
    if not listed.is_file():  # before the folder is walked through, which may be any
        raise InputError(f"ckpt={given} lies in no run folder of knep: {listed} is missing")
    check_folder(folder)
    earlier = [line for line in read_lines(listed) if line and not line.startswith("ckpt=")]
    check_stored(earlier, str(listed))
    placed = any(a.startswith("hydra.run.dir=") for a in arguments)
    place = [] if placed else [f"hydra.run.dir={quoted(str(folder))}"]
    return [*only_read(earlier, arguments), *arguments, *place]


def _check_there(given: str) -> None:
    """Raises InputError for a path that leads nowhere, or that cannot be looked at."""
    try:
        Path(given).stat()
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        what = "is missing" if missing else f"cannot be read ({error.strerror})"
        raise InputError(f"ckpt={given} {what}: give a run folder or a .ckpt file") from error


def resumes(config: Mapping[str, Any], sweep: bool) -> bool:
    """Whether a run looks for an earlier one of its config. Raises InputError for another word than auto or false."""
    from knep.slurm import under_slurm

    wanted = config["resume"]
    if wanted not in (None, "auto", False):
        raise InputError(f"resume={wanted} is not known: write auto, false, or null (auto for sweeps and under SLURM)")
    return config["ckpt"] is None and (wanted == "auto" or (wanted is None and (sweep or under_slurm())))


def root_of(folder: Path) -> Path:
    """Where the other runs of a run's or a sweep's folder lie: outputs/ for one within it, else the folder itself."""
    outputs = Path("outputs").resolve()
    return outputs if folder.resolve().is_relative_to(outputs) else folder


def earlier_runs(config: Mapping[str, Any], root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The runs of the same config under `root` with their summaries, the one that was saved last first."""
    wanted = config_hash(config)
    found = [(path.parent, read_summary(path.parent)) for path in root.rglob("summary.json")]
    found = [(folder, summary) for folder, summary in found if summary.get("config_hash") == wanted]
    return sorted(found, key=lambda run: _saved(run[0]), reverse=True)


def find_ended(config: Mapping[str, Any], root: Path) -> dict[str, Any] | None:
    """The summary of a run of this config that came to its end, with its folder; None where there is none."""
    for folder, summary in earlier_runs(config, root):
        if summary.get("status") in _ENDED and isinstance(summary.get("val/loss"), float):
            return summary | {"folder": str(folder)}
    return None


def find_begun(config: Mapping[str, Any], root: Path) -> Path | None:
    """The folder of the newest run of this config that has a whole checkpoint and no end, or None."""
    for folder, summary in earlier_runs(config, root):
        if summary.get("status") in _ENDED or not _saved(folder):
            continue
        try:
            for place in sorted(folder.glob("member_*")) or [folder]:
                if _saved(place):
                    find_whole(place, warn=False)
        except InputError as error:
            print(f"knep: resume=auto: {error}", file=sys.stderr)
            continue
        return folder
    return None


def _saved(folder: Path) -> int:
    """When the newest checkpoint under a run folder was written, in ns; 0 where there is none."""
    names = ("checkpoints/last.ckpt", "checkpoints/best.ckpt")
    return max((p.stat().st_mtime_ns for name in names for p in folder.glob(f"**/{name}")), default=0)

"""What TensorBoard calls a run, which is the folder that its events lie in: a sweep's jobs by what they were."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

EVENTS = "tensorboard"
_UNFIT = re.compile(r"[^\w.,=+@-]", re.ASCII)  # in a folder's name, or where TensorBoard filters by it
_LONGEST = 120


# Run folder -> the name of its events, of jobs that this process runs.
_names: dict[Path, str] = {}


def events_folder(folder: Path) -> str:
    """The name of the folder of events within a run's: "lr=0.1,dropout=none" for a sweep's job that `name_job` has
    named, now or when it began, "tensorboard" for any other run.
    """
    run = folder.parent if folder.name.startswith("member_") else folder
    there = min((p.name for p in _named(folder) if not p.is_symlink()), default=EVENTS)
    return _names.get(run.resolve(), there)


def name_job(folder: Path, own: Sequence[str]) -> None:
    """Gives the events of a job that is to run in `folder` its name, those of its earlier life too.

    own: the override lines by which it differs from the other jobs of its sweep.
    """
    _unlink(folder)  # else the events would land in the run of an earlier sweep
    _names.pop(folder.resolve(), None)
    for place in (folder, *folder.glob("member_*")):
        before, now = place / events_folder(place), place / _name(own)
        if before.is_dir() and not now.exists():
            before.rename(now)
    _names[folder.resolve()] = _name(own)


def link_job(folder: Path, own: Sequence[str], ran: Path) -> None:
    """Shows a job that ran in another folder, `ran`, among those of its sweep: links in `folder` lead to its events."""
    if ran.resolve() == folder.resolve():
        return
    _unlink(folder)
    for place in (ran, *ran.glob("member_*")):
        events, link = place / events_folder(place), folder / place.relative_to(ran) / _name(own)
        if events.is_dir():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(events.resolve(), link.parent.resolve()))


def _name(own: Sequence[str]) -> str:
    keys, values = [line.partition("=")[0].lstrip("+") for line in own], [line.partition("=")[2] for line in own]
    last = [key.rpartition(".")[2] for key in keys]
    short = [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]
    told = ",".join(f"{name}={value}" for name, value in zip(short, values, strict=True))
    return _UNFIT.sub("_", told)[:_LONGEST] or EVENTS


def _named(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if "=" in p.name and p.is_dir()] if folder.is_dir() else []


def _unlink(folder: Path) -> None:
    for place in (folder, *folder.glob("member_*")):
        for path in place.iterdir() if place.is_dir() else ():
            if "=" in path.name and path.is_symlink():
                path.unlink()

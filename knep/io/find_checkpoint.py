"""Which checkpoint of a run folder there is to go on from; torch is brought only where a file has to be opened."""

from __future__ import annotations

import sys
from pathlib import Path

from knep.errors import InputError
from knep.utils.text import shown


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
        raise InputError(
            f"ckpt={folder} has no checkpoints/last.ckpt to resume: start the run again without ckpt=, or give another "
            "run folder"
        )
    return sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True)


def find_whole(ckpt: str | Path, warn: bool = True) -> Path:
    """The newest whole checkpoint of a run folder, with a line on the damaged ones; a file stands for itself.

    Raises InputError where none is whole.
    """
    from knep.io.checkpoint import damage  # brings torch, which `--cfg` and `--help` do without

    if not Path(ckpt).is_dir():
        return find_checkpoint(ckpt)
    wrong: list[str] = []
    for path in _newest_first(Path(ckpt)):
        what = damage(path)
        if what is None:
            if wrong and warn:
                print(f"knep: {shown(', '.join(wrong))}: going on from {path.name}", file=sys.stderr)
            return path
        wrong.append(f"{path} {what}")
    raise InputError(f"{', '.join(wrong)}: no whole checkpoint is left to resume, start the run again without ckpt=")


def run_folder(ckpt: str | Path) -> Path:
    """The run folder that a checkpoint belongs to."""
    path = Path(ckpt)
    return path if path.is_dir() else path.parent.parent


def saved_of(ckpt: str | None, several: bool, place: Path) -> Path | None:
    """The folder or file that `ckpt` means for the run or member in `place`; None where nothing was saved of it.

    several: the run trains members, each in a folder of its own.
    """
    if ckpt is None or not several:
        return Path(ckpt) if ckpt else None
    member = run_folder(ckpt) / place.name
    return member if newest_save(member) else None


def newest_save(folder: Path) -> int:
    """When the newest checkpoint under a run folder was written, in ns; 0 where there is none."""
    names = ("checkpoints/last.ckpt", "checkpoints/best.ckpt")
    return max((p.stat().st_mtime_ns for name in names for p in folder.glob(f"**/{name}")), default=0)

"""`ckpt=`: going on with a run from its folder or a checkpoint file."""

from __future__ import annotations

import sys
from pathlib import Path

from knep.errors import InputError
from knep.safe import check_stored
from knep.strangers import check_folder, read_lines


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
    found = [p for p in (folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")) if p.is_file()]
    if not found:
        raise InputError(f"ckpt={folder} has no checkpoints/last.ckpt to resume: give another run folder")
    return sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True)


def find_whole(ckpt: str | Path) -> Path:
    """The newest whole checkpoint of a run folder, with a line on each damaged one; a file stands for itself.

    Raises InputError where none is whole.
    """
    from knep.checkpoint import damage  # brings torch, which `--cfg` and `--help` do without

    if not Path(ckpt).is_dir():
        return find_checkpoint(ckpt)
    wrong: list[str] = []
    for path in _newest_first(Path(ckpt)):
        what = damage(path)
        if what is None:
            if wrong:
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
    given = next((a.removeprefix("ckpt=") for a in arguments if a.startswith("ckpt=")), "")
    if given in ("", "null"):
        return arguments
    folder = run_folder(given)
    if "${" in str(folder):
        raise InputError(f"ckpt={given} has ${{ in its name, which stands for another value: rename the folder")
    check_folder(folder)
    members = sorted(folder.glob("member_*"))
    if not members:
        find_checkpoint(given)
    listed = folder / "overrides.txt"
    if not listed.is_file():
        raise InputError(f"ckpt={given} lies in no run folder of knep: {listed} is missing")
    earlier = [line for line in read_lines(listed) if line and not line.startswith("ckpt=")]
    check_stored(earlier, str(listed))
    place = [] if any(a.startswith("hydra.run.dir=") for a in arguments) else [f"hydra.run.dir='{folder}'"]
    return [*earlier, *arguments, *place]

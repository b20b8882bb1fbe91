"""`ckpt=`: going on with a run from its folder or a checkpoint file."""

from __future__ import annotations

from pathlib import Path

from knep.errors import InputError


def find_checkpoint(ckpt: str | Path) -> Path:
    """The checkpoint file that `ckpt` (a run folder or a file) means. Raises InputError where there is none."""
    path = Path(ckpt)
    if path.is_dir():
        found = path / "checkpoints" / "last.ckpt"
        if not found.is_file():
            raise InputError(f"ckpt={ckpt} has no checkpoints/last.ckpt to resume: give another run folder")
        return found
    if not path.is_file():
        raise InputError(f"ckpt={ckpt} is missing: give a run folder or a .ckpt file")
    return path


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
    members = sorted(folder.glob("member_*"))
    if not members:
        find_checkpoint(given)
    listed = folder / "overrides.txt"
    if not listed.is_file():
        raise InputError(f"ckpt={given} lies in no run folder of knep: {listed} is missing")
    earlier = [line for line in listed.read_text().splitlines() if line and not line.startswith("ckpt=")]
    place = [] if any(a.startswith("hydra.run.dir=") for a in arguments) else [f"hydra.run.dir='{folder}'"]
    return [*earlier, *arguments, *place]

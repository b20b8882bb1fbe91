"""Finding a data set's files: the user's folder and the system's first, a download last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from knep.errors import InputError


def find_folder(
    name: str, root: str | None, needed: Sequence[str], places: Sequence[Path], download: Callable[[Path], object]
) -> Path:
    """The first folder that has a file for each of `needed`, plain or as .gz; a download into `root` where none has.

    places: subfolders of root (relative) and system folders (absolute). Raises InputError naming what is missing.
    """
    base = Path(root) if root else Path("data")
    candidates = [base / place for place in places]
    for folder in candidates:
        if all(exists(folder, file) for file in needed):
            return folder
    partly = next((f for f in candidates if any(exists(f, file) for file in needed)), None)
    if partly is not None:
        missing = next(file for file in needed if not exists(partly, file))
        raise InputError(f"{partly / missing} is missing: put it there, plain or as .gz")
    try:
        download(base)
    except Exception as error:  # whatever the network and torchvision raise means the same to the user
        where = ", ".join(str(folder) for folder in candidates)
        raise InputError(
            f"{name} is in none of {where} and cannot be downloaded ({type(error).__name__}): set data.root"
        ) from error
    for folder in candidates:
        if all(exists(folder, file) for file in needed):
            return folder
    raise InputError(f"{name} was downloaded to {base} but {needed[0]} is not there: set data.root")


def exists(folder: Path, file: str) -> bool:
    return (folder / file).is_file() or (folder / f"{file}.gz").is_file()


def resolve(folder: Path, file: str) -> Path:
    """The plain file, or else its .gz."""
    return folder / file if (folder / file).is_file() else folder / f"{file}.gz"

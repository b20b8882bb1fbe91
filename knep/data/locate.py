"""Finding a data set's files: the user's folder and the system's first, a download last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from knep.errors import InputError


def find_folder(
    name: str,
    root: str | None,
    needed: Sequence[str],
    places: Sequence[Path],
    download: Callable[[Path], object] | None,
) -> Path:
    """The first folder that has a file for each of `needed`, plain or as .gz; a download into `root` where none has.

    places: subfolders of root (relative) and system folders (absolute); download: None where none may be.
    Raises InputError naming what is missing.
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
    if download is None:
        raise InputError(f"the data are not in data.root={base}, and a checkpoint may not download: put them there")
    before = base.exists()
    try:
        download(base)
    except InputError:
        raise
    except Exception as error:  # whatever the network and torchvision raise means the same to the user
        if not before:
            _remove_empty(base)
        where = ", ".join(str(folder) for folder in candidates)
        raise InputError(
            f"{name} is in none of {where} and cannot be downloaded ({type(error).__name__}): set data.root"
        ) from error
    for folder in candidates:
        if all(exists(folder, file) for file in needed):
            return folder
    raise InputError(f"{name} was downloaded to {base} but {needed[0]} is not there: set data.root")


def _remove_empty(folder: Path) -> None:
    """Removes the folders in which a download that failed left nothing, and no file."""
    below = [path for path in folder.rglob("*") if path.is_dir()]
    for path in [*sorted(below, reverse=True), folder]:
        with contextlib.suppress(OSError):
            path.rmdir()


def allowance(size: int) -> int:
    """Bytes that a compressed file of `size` bytes may unpack to; images of real data shrink to a half or a tenth."""
    return min(max(64 << 20, 40 * size), 2 << 30)


def exists(folder: Path, file: str) -> bool:
    return (folder / file).is_file() or (folder / f"{file}.gz").is_file()


def resolve(folder: Path, file: str) -> Path:
    """The plain file, or else its .gz."""
    return folder / file if (folder / file).is_file() else folder / f"{file}.gz"

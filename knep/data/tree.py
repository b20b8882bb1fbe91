"""Which images a folder of class folders holds, where its links may lead, and how odd names are printed."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from knep.errors import InputError
from knep.text import shown

KINDS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})


def list_images(folder: Path, inside: Path | None = None) -> tuple[list[Path], Tensor, list[str]]:
    """Files, labels (N,) and class folders' names of a folder of class folders, in alphabetical order.

    inside: the folder that no symbolic link may leave; None follows all. Names that begin with a dot are left out.
    Raises InputError for fewer than two classes, a class folder without images, and a link that leads out or nowhere.
    """
    _check_link(folder, inside)
    classes = [e.name for e in _entries(folder, inside) if e.is_dir()]
    if len(classes) < 2:
        raise InputError(f"data.root={shown(folder)} has {len(classes)} class folders: give it one folder per class")
    files: list[Path] = []
    labels: list[int] = []
    for k, name in enumerate(classes):
        within = folder / name
        found = [within / e.name for e in _entries(within, inside) if _is_image(e)]
        if not found:
            raise InputError(f"{shown(within)} is a class folder without images: add some "
                             f"({', '.join(sorted(KINDS))}) or remove it")  # fmt: skip
        files += found
        labels += [k] * len(found)
    return files, torch.tensor(labels), classes


def _entries(folder: Path, inside: Path | None) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise InputError(f"{shown(folder)} cannot be listed ({error.strerror}): allow reading it") from error
    for entry in found:
        if entry.is_symlink():
            _check_link(Path(entry.path), inside)
    return found


def _is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in KINDS and entry.is_file()


def _check_link(path: Path, inside: Path | None) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python before 3.13 calls a loop of links a RuntimeError
        raise InputError(f"{shown(path)} is a link that leads nowhere: repair or remove it") from error
    if inside is not None and not target.is_relative_to(inside.resolve()):
        raise InputError(
            f"{shown(path)} is a link that leaves data.root, to {shown(target)}: remove it, or write "
            "data.follow_links=true if you trust it"
        )

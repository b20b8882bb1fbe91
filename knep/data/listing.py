"""Which images a folder of class folders holds, and what of it is left out; where its links may lead."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from knep.data.formats import BY_SUFFIX, SUFFIXES
from knep.errors import InputError
from knep.utils.text import shown

KINDS = SUFFIXES | frozenset(BY_SUFFIX)
# What file managers and archives leave behind; names that begin with a dot are left out as well.
_JUNK = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
                   "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"})  # fmt: skip
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_ALSO_CLASSES = frozenset({"valid", "dev"})  # such as valid and invalid
_SPLIT = re.compile(
    r"(?:(train|training|trn)|(val|valid|validation|dev)|(test|testing|tst))(?:[-_ ]?(?:set|data|split|images|imgs))?"
    r"(?:[-_ ]?(?:19|20)\d\d)?"  # train2017
)


@dataclass
class Listing:
    """Class folders' names, in alphabetical order, with their images and what is left out of them.

    files, labels (N,): images by class, those right in the class folder before those in folders below it; deeper: how
    many lie below; left: kinds of file that are not read -> how many.
    """

    classes: list[str]
    files: list[Path] = field(default_factory=list)
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    deeper: int = 0
    left: Counter[str] = field(default_factory=Counter)


def splits(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders of root that are its splits, by "train", "val" and "test", and its other folders.

    Without a folder for training, root itself is the training split. Names as people have them (train, Training,
    valid, validation, dev, testing, train_set) count in any case. Raises InputError where two say the same, for a
    validation or test split without class folders, and for one beside no training split.
    """
    found: dict[str, list[str]] = {}
    for name in _folders(root):
        found.setdefault(_split_of(name), []).append(name)
    others = found.pop("", [])
    if "train" not in found:
        split = next((n for names in found.values() for n in names if n.casefold() not in _ALSO_CLASSES
                      or _folders(root / n)), None)  # fmt: skip
        if split is not None:
            raise InputError(
                f"{shown(root)} has {shown(split)}, the name of a split, and no train: move all class folders of the "
                f"training split into train, and {shown(split)} as well where it is a class"
            )
        return {"train": root}, []
    for split, names in found.items():
        if len(names) > 1:
            raise InputError(f"{shown(root)} has {_listed(names)}, which all say {split}: leave one of them there")
        if split != "train" and not _folders(root / names[0]):
            raise InputError(
                f"{shown(root / names[0])} has no class folders: sort its images into some, or write "
                f"data.root={shown(root / found['train'][0])} to split images off the training split"
            )
    return {split: root / names[0] for split, names in found.items()}, others


def taken_for_classes(listing: Listing) -> list[str]:
    """Classes with the name of a split."""
    return [name for name in listing.classes if _split_of(name)]


def list_images(folder: Path, inside: Path | None = None) -> Listing:
    """The images of a folder of class folders, however deep they lie in those.

    inside: the folder that no symbolic link may leave; None follows all. Names that begin with a dot, and what file
    managers and archives leave behind, do not count. Raises InputError for fewer than two classes, a class folder
    without images, two of one name in Unicode, and a link that leads out or nowhere.
    """
    _check_link(folder, inside)
    entries = list(_entries(folder, inside))
    listing = Listing([e.name for e in entries if e.is_dir()])
    if len(listing.classes) < 2:
        raise InputError(_too_few(folder, entries))
    _check_names(folder, listing.classes)
    listing.left.update(_kind(e) for e in entries if not e.is_dir())
    counts = []
    for name in listing.classes:
        before, left = len(listing.files), listing.left.copy()
        listing.files += _walk(folder / name, inside, listing)
        counts.append(len(listing.files) - before)
        if not counts[-1]:
            raise InputError(_no_images(folder / name, listing.left - left))
    listing.labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return listing


def normal(name: str) -> str:
    """A class's name with its accents composed: macOS writes é as two characters, most others as one."""
    return unicodedata.normalize("NFC", name)


def counted(kinds: Counter[str]) -> str:
    """Counts of kinds of file, the commonest first, fit to print."""
    return ", ".join(f"{count} {shown(kind)}" for kind, count in kinds.most_common(8)) + (", ..." * (len(kinds) > 8))


def _walk(folder: Path, inside: Path | None, listing: Listing) -> Iterator[Path]:
    """Images of a class folder and of the folders below it, each folder once."""
    waiting, seen = [folder], set()
    while waiting:
        here = waiting.pop()
        facts = here.stat()
        if (facts.st_dev, facts.st_ino) in seen:  # a link to a folder above it, or a second one to the same
            listing.left["link to a folder already read"] += 1
            continue
        seen.add((facts.st_dev, facts.st_ino))
        below = []
        for entry in _entries(here, inside):
            if entry.is_dir():
                below.append(here / entry.name)
            elif _is_image(entry):
                listing.deeper += here != folder
                yield here / entry.name
            else:
                listing.left[_kind(entry)] += 1
        if here == folder:
            _check_order(folder, below)
        waiting += reversed(below)


def _check_order(folder: Path, below: Iterable[Path]) -> None:
    held = {_split_of(path.name) for path in below} - {""}
    if "train" in held and len(held) > 1:
        raise InputError(
            f"{shown(folder)} has its own folders for {_listed(sorted(held))}: write data.root={shown(folder)}, or put "
            "the splits first, as in FOLDER/train/<class> and FOLDER/test/<class>"
        )


def _split_of(name: str) -> str:
    """ "train", "val" or "test" where the name of a folder says so, else ""."""
    match = _SPLIT.fullmatch(name.casefold())
    return "" if match is None else ("train", "val", "test")[[bool(g) for g in match.groups()].index(True)]


def _check_names(folder: Path, classes: Iterable[str]) -> None:
    twice = [name for name, count in Counter(map(normal, classes)).items() if count > 1]
    if twice:
        raise InputError(
            f"{shown(folder)} has two folders called {shown(twice[0])}, one of which writes its accents as characters "
            "of their own: move their files into one"
        )


def _too_few(folder: Path, entries: list[os.DirEntry[str]]) -> str:
    """What to say of a folder with fewer than two class folders."""
    where, folders = shown(folder), [e.name for e in entries if e.is_dir()]
    images = sum(_is_image(e) for e in entries)
    archive = next((e.name for e in entries if e.name.lower().endswith(_ARCHIVES)), None)
    said = f"data.root={where} has {len(folders)} class folder{'s' * (len(folders) != 1)}"
    if len(folders) == 1 and _folders(folder / folders[0]):
        return f"{said}, {shown(folders[0])}, and folders in it: if those are the classes, write data.root={where}/" \
               f"{shown(folders[0])}"  # fmt: skip
    if not folders and images:
        return f"{said} and {images} images: sort them into one folder per class"
    if not folders and archive is not None:
        return f"{said} and an archive, {shown(archive)}: unpack it"
    return f"{said}: give it one folder per class"


def _no_images(folder: Path, left: Counter[str]) -> str:
    held = f", with {counted(left)}" if left else ""
    return f"{shown(folder)} is a class folder without images{held}: add some ({', '.join(sorted(KINDS))}) or remove it"


def _listed(names: Iterable[str]) -> str:
    *some, last = map(shown, names)
    return f"{', '.join(some)} and {last}" if some else last


def _entries(folder: Path, inside: Path | None) -> list[os.DirEntry[str]]:
    """What counts in a folder, in alphabetical order. Raises InputError for a link that leads out or nowhere."""
    found = _scanned(folder)
    for entry in found:
        if entry.is_symlink():
            _check_link(Path(entry.path), inside)
    return found


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _scanned(folder) if entry.is_dir()]


def _scanned(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            kept = (e for e in entries if not e.name.startswith(".") and e.name.casefold() not in _JUNK)
            return sorted(kept, key=lambda e: e.name)
    except OSError as error:
        raise InputError(f"{shown(folder)} cannot be listed ({error.strerror}): allow reading it") from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in KINDS and entry.is_file()


def _kind(entry: os.DirEntry[str]) -> str:
    if not entry.is_file():
        return "no file (a pipe or device)"
    return os.path.splitext(entry.name)[1].lower() or "without a suffix"


def _check_link(path: Path, inside: Path | None) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python before 3.13 calls a loop of links a RuntimeError
        raise InputError(f"{shown(path)} is a link that leads nowhere: repair or remove it") from error
    if path.is_symlink() and path.parent.resolve().is_relative_to(target):
        raise InputError(f"{shown(path)} is a link to a folder that it lies in: remove it")
    if inside is not None and not target.is_relative_to(inside.resolve()):
        raise InputError(
            f"{shown(path)} is a link that leaves data.root, to {shown(target)}: remove it, or write "
            "data.follow_links=true if you trust it"
        )

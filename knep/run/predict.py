"""Classes of image files by a trained run, and `knep predict`, which finds the files and writes what came out."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from knep.errors import InputError
from knep.utils.text import shown

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 64  # images in memory at a time
_NAMED = 10
Ranked = list[tuple[str, float]]


def add_to(commands: argparse._SubParsersAction) -> None:
    """The arguments of `knep predict`."""
    parser = commands.add_parser("predict", help="classes of images with probabilities: knep predict RUN FOLDER")
    parser.add_argument("source", type=Path, metavar="run", help="a run folder or a .ckpt file")
    parser.add_argument("images", type=Path, nargs="+", metavar="FOLDER|IMAGE", help="a folder is read whole")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each image, print none")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes for each image, 3 by default")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE.", help="where its model comes from")
    parser.set_defaults(run=command)


def command(args: argparse.Namespace) -> None:
    """Prints a line for each image, or writes a table of all. What can be refused at once is, without torch."""
    from knep.config.instantiate import allow

    for name in args.allow:
        allow(name)
    _check(args)
    files = image_files(args.images)
    ranked = list(predict(args.source, files, args.top))
    if args.csv is None:
        for path, classes in ranked:
            print(f"{shown(path)}  " + "  ".join(f"{shown(name)} {p:.1%}" for name, p in classes))
        return
    from knep.io.atomic import write_atomic

    write_atomic(args.csv, _table(ranked))
    print(f"{len(ranked):,} images: {shown(args.csv)}")


def _check(args: argparse.Namespace) -> None:
    if args.top < 1:
        raise InputError(f"--top={args.top} must be at least 1 class")
    if not args.source.exists():
        raise InputError(f"{shown(args.source)} is missing: give a run folder or a .ckpt file")
    for path in args.images:
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{shown(path)} is missing, or no file: give images, or folders of images")
    if args.csv is not None and (args.csv.exists() or args.csv.is_symlink()):
        raise InputError(f"{shown(args.csv)} exists already: remove it or choose another name")
    if args.csv is not None and not os.access(args.csv.parent, os.W_OK):
        raise InputError(f"--csv={shown(args.csv)} cannot be written: choose another folder")


def image_files(paths: Iterable[Path]) -> list[Path]:
    """The images that paths name: files as they are, folders with all they hold, in alphabetical order.

    Names that begin with a dot are left out, and links to folders, and what is no image by its ending: with a line that
    says so. Raises InputError for a folder without images, or one that cannot be listed.
    """
    from knep.data.listing import KINDS

    files, others = [], []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        held = list(_held(path))
        images = [p for p in held if p.suffix.lower() in KINDS and p.is_file()]
        if not images:
            raise InputError(f"{shown(path)} has no images ({', '.join(sorted(KINDS))}): give another folder")
        files += images
        others += sorted(set(held) - set(images))
    if others:
        print(f"knep: left out, no images by their names: {_listed(others)}", file=sys.stderr)
    return files


def _held(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder, onerror=_refuse):
        linked = [name for name in folders if Path(here, name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted([*files, *linked]) if not name.startswith("."))


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"{shown(error.filename)} cannot be listed ({error.strerror}): allow reading it") from error


def _listed(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
    return ", ".join(shown(path) for path in paths[:_NAMED]) + more


def predict(run: Path, images: Iterable[Path], top: int = 3) -> Iterator[tuple[Path, Ranked]]:
    """(path, [(class name, probability), ...]) of each image, likeliest first; ensembles average probabilities.

    Raises InputError before the first one where images cannot be read, naming all of them.
    """
    import torch

    from knep.engine.load import load_members

    members = load_members(run)
    facts, paths = members[0].about, list(images)
    found: list[Ranked] = []
    with torch.no_grad():
        for x_NCHW in _batches(paths, facts["channels"], facts["image_size"], facts.get("bits", 16)):
            p_NK = torch.stack([m(x_NCHW).softmax(1) for m in members]).mean(0)
            values_Nk, order_Nk = p_NK.topk(min(top, p_NK.shape[1]))
            for values, order in zip(values_Nk.tolist(), order_Nk.tolist(), strict=True):
                found.append([(facts["class_names"][k], p) for k, p in zip(order, values, strict=True)])
    yield from zip(paths, found, strict=True)


def _batches(paths: Sequence[Path], channels: int, size: int, bits: int) -> Iterator[Tensor]:
    """uint8 (N, C, S, S) of all; from the first broken image on, only the other broken ones are looked for."""
    import torch

    from knep.data.decode import read_image

    broken: dict[Path, InputError] = {}
    for start in range(0, len(paths), _BATCH):
        batch = []
        for path in paths[start : start + _BATCH]:
            try:
                batch.append(read_image(path, channels, size, bits=bits))
            except InputError as error:
                broken[path] = error
        if not broken:
            yield torch.stack(batch)
    if len(broken) == 1:
        raise next(iter(broken.values()))
    if broken:
        raise InputError(
            f"{len(broken):,} of {len(paths):,} images cannot be read: repair or remove {_listed(list(broken))}"
        )


def _table(ranked: Sequence[tuple[Path, Ranked]]) -> str:
    """A row for each image: file, class, probability, class_2, probability_2, ..."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    ranks = range(1, len(ranked[0][1]) + 1)
    rows.writerow(["file", *(f"{name}_{k}" if k > 1 else name for k in ranks for name in ("class", "probability"))])
    for path, classes in ranked:
        rows.writerow([shown(path), *(cell for name, p in classes for cell in (shown(name), f"{p:.6g}"))])
    return text.getvalue()

"""What a trained run says of images, tables and texts, and `knep predict`, which finds the files and writes it."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from knep.errors import InputError
from knep.utils.text import shown

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 64  # images in memory at a time
_NAMED = 10
_OF_IMAGES = ("multiclass", "binary", "multilabel", "regression", "segmentation")
_IN_ORDER = ("multilabel", "regression")  # each of whose names has a column of its own in a table
Ranked = list[tuple[str, float]]


def add_to(commands: argparse._SubParsersAction) -> None:
    """The arguments of `knep predict`."""
    parser = commands.add_parser(
        "predict", help="classes of images, of a table's rows, the next bytes of a text: knep predict RUN FOLDER|FILE"
    )
    parser.add_argument("source", type=Path, metavar="run", help="a run folder or a .ckpt file")
    parser.add_argument("images", type=Path, nargs="+", metavar="FOLDER|FILE", help="a folder is read whole")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each image, print none")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="of task=segmentation: a PNG for each image")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes for each image, 3 by default")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE.", help="where its model comes from")
    parser.set_defaults(run=command)


def command(args: argparse.Namespace) -> None:
    """Prints a line for each image, or writes a table of all. What can be refused at once is, without torch."""
    from knep.config.instantiate import allow

    for name in args.allow:
        allow(name)
    _check(args)
    files = image_files(args.images) if all(map(_of_images, args.images)) else None  # what is no image needs no run

    from knep.engine.load import load_members

    members = load_members(args.source)
    task, reads = members[0].task.name, _reads(members[0], args.source)
    if args.masks is not None and task != "segmentation":
        raise InputError(
            f"--masks={shown(args.masks)} writes a class for each pixel, and this run is of task={task}: leave it out"
        )
    files = _files(reads, args.images) if files is None or reads != "image" else files
    found = list(_said(members, reads, files, args.masks))
    if args.csv is None:
        form = ".6g" if task == "regression" else ".1%"
        for path, named in found:
            told = _ranked(named, task, args.top)
            print(f"{shown(path)}  " + "  ".join(f"{shown(name)} {p:{form}}" for name, p in told))
    else:
        from knep.io.atomic import write_atomic

        ranked = [(path, _ranked(named, task, args.top)) for path, named in found]
        what = "share" if task == "segmentation" else "probability"
        write_atomic(args.csv, _in_order(found) if task in _IN_ORDER else _table(ranked, what))
        kind = {"image": "images", "row": "rows", "text": "texts"}[reads]
        print(f"{len(found):,} {kind}: {shown(args.csv)}")
    if args.masks is not None:
        print(f"{len(found):,} masks: {shown(args.masks)}")


def _of_images(path: Path) -> bool:
    """Whether a path can be refused as one of images, before its run is read: a folder may be of texts."""
    from knep.data.listing import KINDS

    return path.suffix.lower() in KINDS


def _reads(member: Any, run: Path) -> str:
    """image, row or text: what a run reads. Raises InputError for one whose inputs are in no files that are known."""
    facts, task = member.about, member.task.name
    if "fitted" in facts:
        return "row"
    target = str((facts["config"].get("data") or {}).get("_target_", ""))
    if task == "tokens" and target == "knep.data.own.text.Text":
        return "text"
    if task in _OF_IMAGES and facts.get("dtype", "uint8") == "uint8" and "shape" not in facts:
        return "image"
    raise InputError(
        f"{shown(run)} is of task={task} on inputs that are in no image, table or text file: load it with "
        "knep.engine.load.load_module, and call module.task.predictions(module(x))"
    )


def _files(reads: str, paths: Sequence[Path]) -> list[Path]:
    """The files that paths name. Raises InputError for a folder where tables are read, or one without files."""
    if reads == "image":
        return image_files(paths)
    if reads == "text":
        from knep.data.own.text import files_in

        return [file for path in paths for file in files_in(path)]
    return list(paths)


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

    Of a run on a table the paths are tables with the same columns, and each of their rows is told as FILE.csv:1 and on;
    of a run on texts they are texts, and the classes the bytes that may follow. Of labels the likeliest ones, of masks
    the share of pixels of each class, of a regression (name, number in its own unit) of every target.
    Raises InputError before the first one where images cannot be read, naming all of them.
    """
    from knep.engine.load import load_members

    members = load_members(run)
    for path, named in _said(members, _reads(members[0], run), list(images)):
        yield path, _ranked(named, members[0].task.name, top)


def _ranked(named: Ranked, task: str, top: int) -> Ranked:
    return named if task == "regression" else sorted(named, key=lambda pair: -pair[1])[:top]


def _said(
    members: Sequence[Any], reads: str, paths: Sequence[Path], masks: Path | None = None
) -> Iterator[tuple[Path, Ranked]]:
    """(path, [(name, number), ...]) in the order of the run's names."""
    import torch

    facts, task = members[0].about, members[0].task
    targets = None
    if masks is not None:
        from knep.run.masks import mask_files

        targets = mask_files(masks, paths)
    if reads == "row":
        paths, batches = _of_tables(paths, facts)
    elif reads == "text":
        batches = (_last_bytes(path, facts["image_size"]) for path in paths)
    else:
        batches = _batches(paths, facts["channels"], facts["image_size"], facts.get("bits", 16))
    found: list[Ranked] = []
    with torch.no_grad():
        for x in batches:
            said = _numbers(members, x)
            if targets is not None:
                from knep.run.masks import write_mask

                classes = task.predictions(members[0](x).float()).argmax(1)
                for k, mask in enumerate(classes, start=len(found)):
                    write_mask(targets[k], paths[k], mask)
            found += [list(zip(facts["class_names"], row, strict=True)) for row in said.tolist()]
    yield from zip(paths, found, strict=True)


def _numbers(members: Sequence[Any], x: Tensor) -> Tensor:
    """(N, K): of each row a number for each of the run's names."""
    import torch

    task = members[0].task
    if task.name == "multiclass":
        return torch.stack([m(x).softmax(1) for m in members]).mean(0)
    says = task.predictions(members[0](x).float())
    if task.name == "binary":
        return torch.stack([1 - says, says], 1)
    if task.name == "tokens":
        return says[:, -1]  # of what follows the last byte
    if task.name == "segmentation":
        classes = torch.arange(says.shape[1])[:, None]
        return (says.argmax(1).flatten(1)[:, None] == classes).float().mean(2)
    return says.reshape(len(says), -1)


def _last_bytes(path: Path, length: int) -> Tensor:
    """int64 (1, at most length - 1): where a text ends, as many bytes as a row in training had before its last one.

    Raises InputError for one that is empty or cannot be read.
    """
    import torch

    try:
        text = path.read_bytes()[-(length - 1) :]
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read ({error.strerror}): allow reading it") from error
    if not text:
        raise InputError(f"{shown(path)} is empty: give a text that something may follow")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]


def _of_tables(paths: Sequence[Path], facts: Mapping[str, Any]) -> tuple[list[Path], list[Tensor]]:
    """What each row is called, and the rows (N, F) of each table, as the run read its own."""
    from knep.data.own.csv_table import rows_of

    encoding = facts["config"].get("data", {}).get("encoding", "utf-8")
    batches = [rows_of(path, facts, encoding) for path in paths]
    names = [Path(f"{path}:{k}") for path, x in zip(paths, batches, strict=True) for k in range(1, len(x) + 1)]
    return names, batches


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


def _in_order(found: Sequence[tuple[Path, Ranked]]) -> str:
    """A row for each image: file, and each target in its own unit, or the probability of each label."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", *(shown(name) for name, _ in found[0][1])])
    rows.writerows([shown(path), *(f"{value:.6g}" for _, value in numbers)] for path, numbers in found)
    return text.getvalue()


def _table(ranked: Sequence[tuple[Path, Ranked]], what: str) -> str:
    """A row for each image: file, class, probability, class_2, probability_2, ... what: the name of the numbers."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    ranks = range(1, len(ranked[0][1]) + 1)
    rows.writerow(["file", *(f"{name}_{k}" if k > 1 else name for k in ranks for name in ("class", what))])
    for path, classes in ranked:
        rows.writerow([shown(path), *(cell for name, p in classes for cell in (shown(name), f"{p:.6g}"))])
    return text.getvalue()

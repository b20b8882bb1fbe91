"""Reads the files of a run that has ended: a schema at each door, nothing unpickled, nothing of them run."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from knep.doctor.log.curves import Curves, Series, assigned, plain_name
from knep.errors import InputError
from knep.io.schema import Check, anything, listed, number, record, table, text
from knep.io.untrusted_folder import check_folder, check_kind, read_lines, read_text
from knep.utils.text import shown

_LARGEST = 64 << 20  # bytes of a file
_ROWS, _COLUMNS, _FIELD = 500_000, 2_000, 10_000  # of a CSV file, and characters of a field
_POINTS, _FILES = 200_000, 100  # of a series, and files of events in a folder
_EVENTS = "events.out.tfevents"
_WANTED = "give a run folder of knep, a folder of TensorBoard events, a metrics CSV or a trainer_state.json"
_POINT = number(finite=False)
_STATE: Check = record(
    {"log_history": listed(table(anything, text(most=300), most=_COLUMNS), most=_ROWS)},
    {"max_steps": number(), "num_train_epochs": number()},
    closed=False,
)
_COMMA = re.compile(r"\s*-?\d*,\d+([eE][+-]?\d+)?\s*")
_LINE = re.compile(r"[+~]{0,2}[\w.@/-]+(=.*)?")


def read(path: Path) -> Curves:
    """The curves in a file or a folder.

    Raises InputError, one line, for what is missing, too large, of a wrong kind, leads elsewhere or has no loss.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(f"--log {shown(path)} is a link that leads nowhere: {_WANTED}")
    if not path.exists():
        raise InputError(f"--log {shown(path)} is missing: {_WANTED}")
    check_kind(path)
    curves = _folder(path) if path.is_dir() else _file(path)
    if not curves.points:
        raise InputError(f"{shown(path)} has no loss: a column or tag named loss, train_loss or val_loss is needed")
    return curves


def _folder(path: Path) -> Curves:
    check_folder(path)
    for name in ("metrics.csv", "trainer_state.json"):
        if (path / name).is_file():
            own = (path / "overrides.txt").is_file() and (path / "config.yaml").is_file()
            return _file(path / name, _lines(path) if own else None)
    events = sorted(p for p in path.rglob(f"{_EVENTS}*") if p.is_file())
    if events:
        return _board(path, events)
    raise InputError(f"--log {shown(path)} holds no run: {_WANTED}")


def _lines(path: Path) -> tuple[str, ...]:
    """The override lines that a run of knep was started by."""
    lines = [line for line in read_lines(path / "overrides.txt") if line.strip()]
    odd = next((line for line in lines if not (_LINE.fullmatch(line) and line.isprintable())), None)
    if odd is not None or len(lines) > 1000:
        what = f"the line {shown(odd[:60])}" if odd is not None else f"{len(lines):,} lines"
        raise InputError(f"{shown(path / 'overrides.txt')} is no list of overrides: {what}")
    return tuple(lines)


def _file(path: Path, lines: tuple[str, ...] | None = None) -> Curves:
    kinds: Mapping[str, Callable[[Path, str], Curves]] = {".csv": _csv, ".json": _state, ".tsv": _csv}
    if path.name.startswith(_EVENTS):
        return _board(path, [path])
    if path.suffix.lower() not in kinds:
        raise InputError(f"--log {shown(path)} is of no kind that is read: {_WANTED}")
    curves = kinds[path.suffix.lower()](path, read_text(path, _WANTED, _LARGEST))
    return curves if lines is None else replace(curves, lines=lines)


def _csv(path: Path, content: str) -> Curves:
    """Lightning's CSVLogger, knep's metrics.csv, and any table with columns such as step, epoch, loss, val_loss, lr."""
    mark = _delimiter(content)
    csv.field_size_limit(_FIELD)
    try:
        rows = csv.reader(io.StringIO(content, newline=""), delimiter=mark, strict=True)
        head = next(rows, [])
        if len(head) > _COLUMNS or len(set(head)) != len(head):
            raise InputError(f"{shown(path)} has {len(head):,} columns, or two of one name: give each its own")
        body = []
        for row in rows:
            if len(body) >= _ROWS:
                raise InputError(f"{shown(path)} has more than {_ROWS:,} rows: keep fewer")
            if row and len(row) != len(head):
                raise InputError(f"{shown(path)}, row {len(body) + 2} has {len(row)} fields, its head {len(head)}")
            body += [row] if row else []
    except csv.Error as error:
        raise InputError(f"{shown(path)} is no table: {error}") from error
    if mark == ";":  # where 0,5 is written for 0.5
        body = [[field.replace(",", ".") if _COMMA.fullmatch(field) else field for field in row] for row in body]
    return _of_rows(path, (dict(zip(head, row, strict=True)) for row in body))


def _delimiter(content: str) -> str:
    """What stands between the names in a table's first line: the mark that parts a loss from the rest of it."""
    head = content.partition("\n")[0].strip()
    parted = {mark: assigned([name.strip('" ') for name in head.split(mark)]) for mark in ",;\t|" if mark in head}
    return max(parted, key=lambda mark: len(parted[mark]), default=",")


def _state(path: Path, content: str) -> Curves:
    """trainer_state.json of Hugging Face's Trainer."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(path)} is no JSON: {_WANTED}") from error
    wrong = _STATE(found)
    if wrong:
        raise InputError(f"{shown(path)} is no trainer_state.json: it{wrong}")
    return _of_rows(path, found["log_history"])


def _of_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Curves:
    """rows: column -> text or number; an empty field is none."""
    rows = list(rows)
    names = assigned(list(dict.fromkeys(name for row in rows for name in row)))
    columns = {plain.lower(): plain for row in rows[:1000] for plain in row}
    place = columns.get("step") or columns.get("global_step") or columns.get("epoch")
    unit = "epoch" if place is not None and place.lower() == "epoch" else "step"
    series: dict[str, Series] = {kind: [] for kind in names}
    for count, row in enumerate(rows):
        where = _number(path, count, place or "", row.get(place)) if place else None
        if where is not None and not math.isfinite(where):
            raise InputError(
                f"{shown(path)}, row {count + 2}, column {shown(place or '')} is {where}: give a finite step"
            )
        for kind, name in names.items():
            value = _number(path, count, name, row.get(name))
            if value is not None:
                series[kind].append((float(count) if where is None else where, value))
    return Curves.of(series, unit, shown(path))


def _number(path: Path, row: int, name: str, value: object) -> float | None:
    """A field as a number, NaN and infinities too; None where it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = float(value) if isinstance(value, str) and len(value) < 60 else value
    except ValueError:
        found = value
    wrong = _POINT(found)
    if wrong:
        raise InputError(f"{shown(path)}, row {row + 2}, column {shown(name[:60])}{wrong}")
    assert isinstance(found, (int, float))
    return float(found)


def _board(path: Path, files: list[Path]) -> Curves:
    """Scalars of TensorBoard's event files: records of protocol buffers, in which nothing can be run."""
    if len(files) > _FILES:
        raise InputError(f"--log {shown(path)} has {len(files)} files of events: give the folder of one run")
    folders: dict[str, dict[str, Series]] = {}
    for file in files:
        check_kind(file)
        if file.stat().st_size > _LARGEST:
            raise InputError(f"{shown(file)} has more than {_LARGEST >> 20} MiB: give a smaller one")
        found = folders.setdefault("" if file == path else file.parent.relative_to(path).as_posix(), {})
        for tag, points in _of_file(file).items():
            before = [point for point in found.get(tag, []) if point[0] < points[0][0]]  # a run that was resumed
            found[tag] = before + points
    named = _named(path, folders)
    names = assigned(list(named))
    return Curves.of({kind: named[name] for kind, name in names.items()}, "step", shown(path))


def _of_file(file: Path) -> dict[str, Series]:
    """Tag -> points of a file of events, in the order of their steps."""
    found: dict[str, Series] = {}
    for tag, step, value in _scalars(file):
        series = found.setdefault(tag, [])
        if len(found) > _COLUMNS or len(series) >= _POINTS:
            raise InputError(f"{shown(file)} has more than {_COLUMNS:,} tags or {_POINTS:,} points of one")
        series.append((float(step), value))
    return {tag: sorted(points, key=lambda point: point[0]) for tag, points in found.items()}


def _named(path: Path, folders: Mapping[str, Mapping[str, Series]]) -> dict[str, Series]:
    """Tags of all folders; one that several have is named with its folder, as SummaryWriter.add_scalars leaves them.

    Raises InputError where the folders are those of several runs.
    """
    found: dict[str, Series] = {}
    for tag in dict.fromkeys(tag for tags in folders.values() for tag in tags):
        places = [folder for folder, tags in folders.items() if tag in tags]
        telling = {f: name for f in places for name in reversed(_names(f, tag)) if assigned([name])}
        if len(places) == 1:
            found[telling.get(places[0], tag)] = folders[places[0]][tag]
        elif not telling and assigned([tag]).keys() & {"train", "val"}:
            some = ", ".join(shown(f or ".") for f in places[:3])
            raise InputError(f"--log {shown(path)} holds {len(places)} runs ({some}): give the folder of one")
        else:
            found |= {name: folders[f][tag] for f, name in telling.items()}
    return found


def _names(folder: str, tag: str) -> tuple[str, ...]:
    """What a tag in a folder could be called: of loss in loss_val, as of loss in val, val_loss."""
    own, split = plain_name(tag), plain_name(folder)
    rest = split.removeprefix(f"{own}_")
    if not folder or rest == split:
        return (f"{folder}_{tag}",) if folder else (tag,)
    return folder, f"{rest}_{own}", f"{rest}_loss" if "loss" in own else folder


def _scalars(file: Path) -> Iterable[tuple[str, int, float]]:
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    try:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    yield value.tag, event.step, float(value.simple_value)
                elif value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
                    array = make_ndarray(value.tensor)
                    if array.size == 1 and array.dtype.kind in "fiu":
                        yield value.tag, event.step, float(array.item())
    except (DecodeError, ValueError, TypeError, OSError, OverflowError) as error:
        raise InputError(f"{shown(file)} is no file of events: {shown(str(error))[:100]}") from error
    except Exception as error:  # tensorboard raises DataLossError of tensorflow or its own stub of it
        if type(error).__name__ == "DataLossError":
            raise InputError(f"{shown(file)} is damaged: give a whole file of events") from error
        raise


def finite(series: Series) -> Series:
    return [(x, v) for x, v in series if math.isfinite(v)]

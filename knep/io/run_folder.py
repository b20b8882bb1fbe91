"""What a run leaves on disk, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from knep.errors import InputError, RunFailed, is_full
from knep.io.atomic import write_atomic
from knep.io.git import DIFF, git
from knep.io.lock import NAME, folders
from knep.io.run_names import events_folder
from knep.io.schema import listed, number, record, text, whole
from knep.io.untrusted_folder import check_kind
from knep.utils.text import shown

_IDENTITY = ("config.yaml", "overrides.txt", "git_hash.txt", "git_diff.patch")
# What a killed process leaves of a file that it was writing.
_HALF = re.compile(r"\..+\.(ckpt|pt)\.part|\.(config\.yaml|overrides\.txt|git_.+|summary\.json|metrics\.csv)\.\d+")
_REMOVAL = 1.0  # seconds in which somebody who removes a folder comes to the end of it
_TEXTS = (*_IDENTITY, "summary.json", "metrics.csv", "hparams.yaml")
_LARGEST = 64 << 20  # bytes of a summary: one with findings has a few thousand
_SUMMARY = record(
    {},
    {
        "status": text(r"\w{1,20}"),
        "reason": text(most=1_000_000),
        "config_hash": text(r"[0-9a-f]{12}"),
        "modules": listed(text(r"[\w.]{1,200}"), most=1000),
        "sealed": whole(0, 10**9),
        **dict.fromkeys(("val/loss", "val/acc", "test/loss", "test/acc"), number(finite=False)),
    },
    closed=False,
)


def write_identity(folder: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """config.yaml (resolved), overrides.txt, git_hash.txt and git_diff.patch: enough to run it again.

    Raises InputError where the folder cannot be written, OSError where there is no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        write_atomic(folder / "overrides.txt", "".join(f"{o}\n" for o in overrides))
        write_atomic(folder / "git_hash.txt", git("rev-parse", "HEAD") or "not a git checkout\n")
        write_atomic(folder / "git_diff.patch", git(*DIFF))
    except OSError as error:
        if is_full(error):
            raise
        raise InputError(
            f"hydra.run.dir={folder} cannot be written ({error.strerror}): choose another folder"
        ) from error


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, atomically; how often the test split was read is never forgotten."""
    read = {} if "sealed" in summary else {k: n for k, n in read_summary(folder).items() if k == "sealed"}
    write_atomic(folder / "summary.json", json.dumps({**summary, **read}, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """What summary.json of a run folder says; nothing where there is none.

    Raises InputError where it is no summary: how often the test split was read must not be forgotten unseen.
    """
    path = folder / "summary.json"
    try:
        check_kind(path)  # a pipe would be waited for
        with path.open("rb") as f:
            found = json.loads(f.read(_LARGEST).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "it is no JSON"
        raise InputError(f"{shown(path)} cannot be read ({why}): move it away to go on without it") from error
    wrong = _SUMMARY(found)
    if wrong:
        raise InputError(f"{shown(path)} is no summary of a run: it{wrong}: move it away to go on without it")
    return found


class _Earlier:
    """What lay in a run folder before a run: texts that the run writes anew, names of all else, checkpoints saved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locked = folder in folders()
        self._texts = {path: path.read_bytes() for path in _written(folder) if path.name in _TEXTS}
        self._names = set(_written(folder))
        self._places = set(_places(folder))
        self._saved = self._stamps()

    def _stamps(self) -> set[tuple[str, int]]:
        saved = [p for place in _places(self._folder) if place.name == "checkpoints" for p in place.glob("*.ckpt")]
        return {(str(path), path.stat().st_mtime_ns) for path in saved}

    @property
    def trained(self) -> bool:
        """Whether the run has saved a checkpoint since."""
        return self._stamps() != self._saved

    @property
    def removed(self) -> bool:
        """Whether somebody has removed the folder since, maybe so that a part of it was made again."""
        return (self._locked and _is_lost(self._folder)) or not self._folder.is_dir()

    def forget(self) -> None:
        """The folder was removed: what was made again of it since goes too, but for checkpoints."""
        self._texts, self._names, self._places = {}, set(), set()
        if not self._stamps():
            self.put_back()

    def put_back(self) -> None:
        """Everything as it was; where there is no room for that, what can be."""
        with contextlib.suppress(OSError):
            for path in set(_written(self._folder)) - self._names:
                path.unlink()
            for place in sorted(set(_places(self._folder)) - self._places, reverse=True):
                with contextlib.suppress(OSError):
                    place.rmdir()
        for path, before in self._texts.items():
            with contextlib.suppress(OSError):
                if not path.is_file() or path.read_bytes() != before:
                    write_atomic(path, before)


def _places(folder: Path) -> list[Path]:
    """The folders in which a run writes, as far as they are there, each before what is in it."""
    runs = [folder, *sorted(folder.glob("member_*"))]
    return [p for run in runs for p in (run, run / "checkpoints", run / events_folder(run)) if p.is_dir()]


def _written(folder: Path) -> list[Path]:
    """The files of a run that come to be before its first checkpoint."""
    found = [place / name for place in _places(folder) for name in _TEXTS]
    events = [p for place in _places(folder) for p in place.glob("events.out.*")]
    return [path for path in (*found, *events) if path.is_file()]


def clear_halves(folder: Path) -> None:
    """Removes, from the folder of a run that has come to its end, files that killed lives of it left half written."""
    for path in (path for place in _places(folder) for path in place.iterdir()):
        if _HALF.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def failures_told(folder: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """An error within leaves summary.json `failed` with its reason, and goes on; a full disk becomes RunFailed.

    facts: what the summary says beside. InputError puts back what lay in the folder: nothing was run.
    """
    earlier = _Earlier(folder)
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) and not earlier.trained:
            earlier.put_back()
            raise
        failure = _failure(error, folder)
        if isinstance(failure, Vanished):
            time.sleep(_REMOVAL)
        if earlier.removed:
            earlier.forget()
            raise Vanished(f"{folder} was removed while the run was in it: start the run again") from error
        told = isinstance(failure, (InputError, RunFailed))
        reason = " ".join((str(failure) if told else f"{type(error).__name__}: {error}").split())
        found = {"findings": list(failure.findings)} if isinstance(failure, RunFailed) and failure.findings else {}
        _write_failed(folder, {"status": "failed", "reason": reason, **found, **facts})
        if failure is error:
            raise
        raise failure from error


def _write_failed(folder: Path, summary: Mapping[str, Any]) -> None:
    """`write_summary` where there may be no room for it: then over the earlier one, which keeps its place on disk.

    What cannot be written even so is let go: the error that ended the run is the one to be told.
    """
    try:
        write_summary(folder, summary)
    except OSError:
        with contextlib.suppress(OSError), (folder / "summary.json").open("r+", encoding="utf-8") as f:
            f.write(json.dumps(summary) + "\n")
            f.truncate()


class Vanished(RunFailed):
    """What a run writes in, or has written, was removed while it ran."""


def check_there() -> None:
    """Raises Vanished where somebody has removed the folder of this process's run: nothing of it is made again."""
    for folder in folders():
        if _is_lost(folder):
            raise Vanished(f"{folder} was removed")


def _is_lost(folder: Path) -> bool:
    """Whether a run's folder that this process holds has neither of the files that are there before its training."""
    return not any((folder / name).exists() for name in (NAME, "config.yaml"))


def _failure(error: Exception, folder: Path) -> Exception:
    """What `error` comes from, as a RunFailed: the first one on the way to it, a full disk, or a part that is gone.

    `error` itself where it was none of them.
    """
    chain: list[BaseException] = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    for gone in (e for e in reversed(chain) if isinstance(e, (FileNotFoundError, NotADirectoryError)) and e.filename):
        if Path(os.fsdecode(gone.filename)).is_relative_to(folder):
            lost = os.fsdecode(gone.filename)
            return Vanished(f"{lost} was removed while the run was writing it: go on with ckpt={folder}")
    for earlier in reversed(chain):
        if isinstance(earlier, RunFailed):
            return earlier
    full = [e for e in reversed(chain) if is_full(e)]
    if full:
        return no_room(full[0], next((e.filename for e in full if e.filename), folder), f"ckpt={folder}")
    return error


def no_room(error: OSError, place: object, way: str) -> RunFailed:
    """What a full disk comes to. place: what could not be written; way: the line by which the run goes on."""
    return RunFailed(f"{place} cannot be written ({error.strerror}): make room, then go on with {way}")


def standing(folder: Path) -> Path:
    """The deepest of `folder` and those around it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def discard(folder: Path, stands: Path) -> None:
    """Removes a run folder in which nothing was left: one with no more in it than the empty log that Hydra opens.

    stands: what was there before, which stays; emptied folders between the two go too.
    """
    log = folder / "train.log"
    with contextlib.suppress(OSError):
        if [*folder.iterdir()] == [log] and log.is_file() and not log.stat().st_size:
            log.unlink()
        for empty in (folder, *folder.parents):
            if stands.resolve().is_relative_to(empty.resolve()):
                return
            empty.rmdir()


def reads(folder: Path) -> int:
    """How often the run in `folder` read its test split, by its summary.json; 0 where there is none."""
    return read_summary(folder).get("sealed", 0)


def begin_reading(folder: Path) -> int:
    """Counts a reading of the test split before it begins, so that no kill hides it; returns the count."""
    count = reads(folder) + 1
    write_summary(folder, {**read_summary(folder), "sealed": count})
    return count


def read_again(run: Path) -> None:
    """Counts one more reading in the summary of a finished run; run: its folder, or a file somewhere below it."""
    folder = run if run.is_dir() else run.parent.parent if run.parent.name == "checkpoints" else run.parent
    for place in (folder, folder.parent) if folder.name.startswith("member_") else (folder,):
        summary = read_summary(place)
        if "sealed" in summary:
            write_summary(place, {**summary, "sealed": summary["sealed"] + 1})
            return


@contextlib.contextmanager
def writers_quiet() -> Iterator[None]:
    """Within, a writer's thread that dies of a full disk prints nothing: the run is told at its next point or save."""
    earlier = threading.excepthook

    def quiet(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            earlier(args)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = earlier

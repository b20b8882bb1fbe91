"""What a run leaves on disk, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from knep.errors import InputError, RunFailed
from knep.lock import held
from knep.run_names import events_folder
from knep.schema import number, record, text, whole
from knep.strangers import check_kind
from knep.text import shown

_IDENTITY = ("config.yaml", "overrides.txt", "git_hash.txt", "git_diff.patch")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LARGEST = 64 << 20  # bytes of a summary: one with findings has a few thousand
_SUMMARY = record(
    {},
    {
        "status": text(r"\w{1,20}"),
        "reason": text(most=1_000_000),
        "config_hash": text(r"[0-9a-f]{12}"),
        "sealed": whole(0, 10**9),
        **dict.fromkeys(("val/loss", "val/acc", "test/loss", "test/acc"), number(finite=False)),
    },
    closed=False,
)
# Where a run lies and how it is watched does not change what it computes.
NOT_HASHED = (
    "allow_targets",
    "budget",
    "name",
    "ckpt",
    "progress",
    "log_every",
    "threads",
    "checkpoint",
    "resume",
    "slurm",
)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder as durable as its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` to a temporary name beside `path`, then renames: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hex digits that name what a run computes: two runs with the same hash do the same."""
    kept = {k: v for k, v in config.items() if k not in NOT_HASHED}
    kept["data"] = {k: v for k, v in config.get("data", {}).items() if k != "write_cache"}
    if "trainer" in config:  # a key that came later, and asks for nothing while it is null
        kept["trainer"] = {k: v for k, v in config["trainer"].items() if (k, v) != ("limit_test_batches", None)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def write_identity(folder: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """config.yaml (resolved), overrides.txt, git_hash.txt and git_diff.patch: enough to run it again.

    Raises InputError where the folder cannot be written, OSError where there is no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        write_atomic(folder / "overrides.txt", "".join(f"{o}\n" for o in overrides))
        write_atomic(folder / "git_hash.txt", git("rev-parse", "HEAD") or "not a git checkout\n")
        write_atomic(folder / "git_diff.patch", git("diff", "HEAD"))
    except OSError as error:
        if error.errno in _FULL:
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


@contextlib.contextmanager
def failures_told(folder: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """An error within leaves summary.json `failed` with its reason, and goes on; a full disk becomes RunFailed.

    facts: what the summary says beside. InputError puts the earlier summary back: nothing was run.
    """
    earlier = read_summary(folder)
    try:
        yield
    except InputError:
        if earlier:
            write_summary(folder, earlier)
        else:
            (folder / "summary.json").unlink(missing_ok=True)
        raise
    except Exception as error:
        failure = _failure(error, folder)
        reason = " ".join(
            (str(failure) if isinstance(failure, RunFailed) else f"{type(error).__name__}: {error}").split()
        )
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


def _failure(error: Exception, folder: Path) -> Exception:
    """The first RunFailed or full disk on the way to `error`, as a RunFailed; `error` itself where there was none."""
    chain: list[BaseException] = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    for earlier in reversed(chain):
        if isinstance(earlier, RunFailed):
            return earlier
    full = [e for e in reversed(chain) if isinstance(e, OSError) and e.errno in _FULL]
    if full:
        place = next((e.filename for e in full if e.filename), folder)
        return RunFailed(f"{place} cannot be written ({full[0].strerror}): make room, then go on with ckpt={folder}")
    return error


def discard(folder: Path) -> None:
    """Removes a run folder in which nothing was trained: only files that knep wrote, then only empty folders.

    One that a run is in, or that holds checkpoints, stays.
    """
    if not folder.is_dir() or (folder / "checkpoints").exists():
        return
    board = folder / events_folder(folder)
    with contextlib.suppress(InputError), held(folder):
        for name in (*_IDENTITY, "train.log", "metrics.csv", "summary.json"):
            (folder / name).unlink(missing_ok=True)
        for events in (*board.glob("events.out.*"), board / "hparams.yaml"):
            events.unlink(missing_ok=True)
    if board.is_dir() and not any(board.iterdir()):
        board.rmdir()
    for empty in (folder, folder.parent):
        try:
            empty.rmdir()
        except OSError:
            return

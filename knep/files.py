"""What a run leaves on disk, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from knep.errors import InputError

# Where a run lies and how it is watched does not change what it computes.
_NOT_HASHED = ("allow_targets", "name", "ckpt", "progress", "log_every", "threads", "checkpoint")


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
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hex digits that name what a run computes: two runs with the same hash do the same."""
    kept = {k: v for k, v in config.items() if k not in _NOT_HASHED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def write_identity(folder: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """config.yaml (resolved), overrides.txt, git_hash.txt and git_diff.patch: enough to run it again.

    Raises InputError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        write_atomic(folder / "overrides.txt", "".join(f"{o}\n" for o in overrides))
        write_atomic(folder / "git_hash.txt", git("rev-parse", "HEAD") or "not a git checkout\n")
        write_atomic(folder / "git_diff.patch", git("diff", "HEAD"))
    except OSError as error:
        raise InputError(
            f"hydra.run.dir={folder} cannot be written ({error.strerror}): choose another folder"
        ) from error


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, atomically."""
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def discard(folder: Path) -> None:
    """Removes a run folder in which nothing was trained: only files that knep wrote, then only empty folders."""
    if not folder.is_dir() or (folder / "checkpoints").exists():
        return
    for name in ("config.yaml", "overrides.txt", "git_hash.txt", "git_diff.patch", "train.log", "metrics.csv"):
        (folder / name).unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        try:
            empty.rmdir()
        except OSError:
            return

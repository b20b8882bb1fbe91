"""Kills a process while it writes checkpoints, damages whole ones, and counts what is lost or passes for whole.

`python -m tests.exhaustive.kill_checkpoints` does the full counts on files of 50 MB and prints them; exit code 1 where
a kill left no whole checkpoint, or one more than an interval old, or where damage was not found.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from knep.io import checkpoint

SIZES = (1, 2, 4, 3)  # a checkpoint has several tensors: shares of its size


def _state(megabytes: float, step: int = 0) -> dict[str, Any]:
    whole = int(megabytes * 1e6 / 4)
    return {
        "step": step,
        "weights": {str(i): torch.full((whole * s // sum(SIZES),), step) for i, s in enumerate(SIZES)},
    }


def _agrees(state: dict[str, Any]) -> bool:
    """Whether all tensors are of the step that the file says."""
    return all(bool((w == state["step"]).all()) for w in state["weights"].values())


def _write_on(path: Path, state: dict[str, Any], tell: int) -> None:
    """Writes a checkpoint for each step, without end; tells the step once it is written."""
    step = state["step"]
    while True:
        step += 1
        for w in state["weights"].values():
            w.fill_(step)
        checkpoint.write(state | {"step": step}, path)
        os.write(tell, struct.pack("q", step))


def kills(count: int, megabytes: float, folder: Path, seed: int = 0) -> dict[str, int]:
    """SIGKILL at random moments of writing: kills, those inside a write, and checkpoints lost or too old."""
    path, draw, state = folder / "last.ckpt", random.Random(seed), _state(megabytes)
    began = time.monotonic()
    checkpoint.write(state, path)
    seconds = time.monotonic() - began
    found = {"kills": 0, "inside a write": 0, "none whole": 0, "older than one interval": 0}
    for _ in range(count):
        hear, tell = os.pipe()
        child = os.fork()
        if not child:
            _write_on(path, state, tell)
        os.close(tell)
        time.sleep(draw.uniform(0, 3 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(hear, "rb") as told:
            steps = told.read()
        done = struct.unpack("q", steps[-8:])[0] if steps else state["step"]
        found["kills"] += 1
        found["inside a write"] += path.with_name(".last.ckpt.part").exists()
        if checkpoint.damage(path) is None and _agrees(kept := checkpoint.read(path)):
            found["older than one interval"] += kept["step"] < done
            state = kept
        else:
            found["none whole"] += 1
    return found


def damages(flips: int, truncations: int, megabytes: float, folder: Path, seed: int = 0) -> dict[str, int]:
    """Single flipped bits and shortened files: how many, and how many passed for whole."""
    path, draw = folder / "damaged.ckpt", random.Random(seed)
    checkpoint.write(_state(megabytes), path)
    size, found = path.stat().st_size, {"flips": flips, "flips not found": 0}
    with path.open("r+b") as f:
        for _ in range(flips):
            bit = draw.randrange(size * 8)
            found["flips not found"] += _flipped(f, bit, path)
    assert checkpoint.damage(path) is None  # every bit was flipped back
    found |= {"truncations": truncations, "truncations not found": 0}
    for length in sorted((draw.randrange(size) for _ in range(truncations)), reverse=True):
        os.truncate(path, length)
        found["truncations not found"] += checkpoint.damage(path) is None
    return found


def _flipped(f: BinaryIO, bit: int, path: Path) -> bool:
    """Whether `path` passes for whole with one bit flipped; the bit is put back."""
    where, mask = bit // 8, 1 << bit % 8
    kept = os.pread(f.fileno(), 1, where)
    os.pwrite(f.fileno(), bytes([kept[0] ^ mask]), where)
    passes = checkpoint.damage(path) is None
    os.pwrite(f.fileno(), kept, where)
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--truncations", type=int, default=50)
    parser.add_argument("--megabytes", type=float, default=50.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = kills(args.kills, args.megabytes, Path(place))
        found |= damages(args.flips, args.truncations, args.megabytes, Path(place))
    print(", ".join(f"{name}: {count}" for name, count in found.items()))
    bad = ("none whole", "older than one interval", "flips not found", "truncations not found")
    sys.exit(1 if any(found[name] for name in bad) else 0)


if __name__ == "__main__":
    main()

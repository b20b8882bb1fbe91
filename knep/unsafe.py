"""`knep import-unsafe`: the one door through which a foreign pickle is let in, in a child process of its own.

A pickle is a program. The child that runs it has no network where the system allows to take it away (Linux with user
namespaces), no more than 8 GiB of memory and ten minutes, and hands back a file of tensors and plain values, which the
parent looks through like any other checkpoint. What the program does to files that the user may write stays done.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knep.errors import InputError
from knep.text import shown

FLAG = "--i-trust-this-file"
_SECONDS = 600
_BYTES = 8 << 30
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000


def import_unsafe(source: Path, target: Path, trusted: bool) -> dict[str, int]:
    """Converts a pickled checkpoint at `source` to a plain one at `target`; returns how many of which it holds.

    trusted: whether the user has said so. Raises InputError where not, for a file that is missing or exists already,
    and for a pickle without a single tensor in it.
    """
    if not trusted:
        raise InputError(
            f"{shown(source)} may be a program, and reading it runs it as you: if you know who made it, add {FLAG}; "
            "otherwise ask for the weights as safetensors"
        )
    if not source.is_file():
        raise InputError(f"{shown(source)} is missing: give a checkpoint file")
    if target.exists() or not target.parent.is_dir():
        raise InputError(f"{shown(target)} cannot be made: it exists already, or its folder does not")
    print(
        f"knep: running the program in {shown(source)} in a child process, to keep its tensors and plain values alone"
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "plain.ckpt"
        _run_child(source, made)
        return _keep(made, source, target)


def _run_child(source: Path, made: Path) -> None:
    command = [sys.executable, "-m", "knep.unsafe", str(source.resolve()), str(made)]
    secrets = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG", "OMP_NUM_THREADS")}
    try:
        done = subprocess.run(
            command,
            cwd=made.parent,
            env={**secrets, "HOME": str(made.parent)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{shown(source)} took more than {_SECONDS} seconds: nothing was kept") from error
    if done.returncode or not made.is_file():
        said = (done.stderr.strip().splitlines() or ["no reason"])[-1][:200]
        raise InputError(f"{shown(source)} cannot be converted ({said}): nothing was kept")


def _keep(made: Path, source: Path, target: Path) -> dict[str, int]:
    """Reads what the child made as if a stranger had, and writes it anew."""
    from knep import checkpoint

    state = checkpoint.read(made)
    counts = {"tensors": len(state["state_dict"]), "values": _values(state["values"]), "left out": state["left_out"]}
    if not counts["tensors"]:
        raise InputError(f"{shown(source)} holds no tensors: nothing was kept")
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write({"state_dict": state["state_dict"], "values": state["values"]}, target)
    print(
        f"knep: {shown(target)} holds {counts['tensors']} tensors and {counts['values']} plain values; "
        f"{counts['left out']} objects were left out. The new file runs nothing; what the old one did while it was "
        "read cannot be undone"
    )
    return counts


def _values(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(map(_values, tree.values()))
    return sum(map(_values, tree)) if isinstance(tree, list) else 1


class _Plain:
    """Takes a loaded checkpoint apart: tensors under dotted names, and what is plain of the rest."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.left_out = 0

    def take(self, node: Any, path: str = "", depth: int = 0) -> Any:
        import torch

        if isinstance(node, torch.nn.Module):
            node = node.state_dict()
        if isinstance(node, torch.Tensor):
            self.tensors[path or "tensor"] = node.detach().cpu().contiguous().clone()
            return None
        if isinstance(node, (str, int, float, bool, type(None))):
            return node if type(node) in (str, int, float, bool, type(None)) else str(node)
        if isinstance(node, Mapping) and depth < 20:
            found = {str(k): self.take(v, f"{path}.{k}" if path else str(k), depth + 1) for k, v in node.items()}
            return {k: v for k, v in found.items() if v not in (None, {}, [])}
        if isinstance(node, (list, tuple)) and depth < 20:
            return [self.take(v, f"{path}.{i}" if path else str(i), depth + 1) for i, v in enumerate(node)]
        self.left_out += 1
        return None


def _limit() -> None:
    """What of a process's rights can be given up, is."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_NEW_USER | _NEW_NET):
            print("knep: this system does not let the network be taken away", file=sys.stderr)


def _child(source: Path, made: Path) -> None:
    import torch

    _limit()
    loaded = torch.load(source, map_location="cpu", weights_only=False)
    key = next((k for k in ("state_dict", "model") if isinstance(loaded, dict) and k in loaded), None)
    plain = _Plain()
    values = {} if key is None else plain.take({k: v for k, v in loaded.items() if k != key})
    plain.tensors = {}  # an optimizer's, which belong to a run that cannot be gone on from
    plain.take(loaded if key is None else loaded[key])
    torch.save({"state_dict": plain.tensors, "values": values, "left_out": plain.left_out}, made)


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))

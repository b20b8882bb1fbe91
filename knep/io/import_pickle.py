"""`knep import-unsafe`: the one door through which a foreign pickle is let in, in a child process of its own.

A pickle is a program. The child that runs it has no network (where it cannot be taken away, nothing is run), no more
than 8 GiB of memory and ten minutes, and hands back a file of tensors and plain values, which the parent looks through
like any other checkpoint. What the program does to files that the user may write stays done.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from knep.errors import InputError
from knep.io.offline import take_network
from knep.utils.orphans import killed_with
from knep.utils.text import shortened, shown

FLAG, NETWORK = "--i-trust-this-file", "--keep-network"
_SECONDS = 600
_BYTES = 8 << 30
_SLACK = 64 << 20  # bytes that the tensors may have beyond four times their file: views of one storage are copied each
_SAID = 4096  # bytes of what the child said that are read
_PLAIN = (str, int, float, bool, type(None))
_KEEPS_NETWORK = 77  # exit code of a child that ran nothing, because its network could not be taken away


def import_unsafe(source: Path, target: Path, trusted: bool, network: bool = False) -> dict[str, int]:
    """Converts a pickled checkpoint at `source` to a plain one at `target`; returns how many of which it holds.

    trusted: whether the user has said so; network: whether the program may keep the network. Raises InputError where
    it is not trusted or its network cannot be taken away, for a file that is missing or exists already, and for a
    pickle without a single tensor in it.
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
    with tempfile.TemporaryDirectory(dir=target.parent.resolve(), ignore_cleanup_errors=True) as folder:
        made = Path(folder) / "plain.ckpt"
        _run_child(source, made, network)
        return _keep(made, source, target)


def _run_child(source: Path, made: Path, network: bool) -> None:
    most = 4 * source.stat().st_size + _SLACK
    command = [
        sys.executable,
        "-m",
        "knep.io.import_pickle",
        str(source.resolve()),
        str(made),
        str(most),
        str(int(network)),
    ]
    secrets = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG", "OMP_NUM_THREADS")}
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [*command, str(os.getpid())],
            cwd=made.parent,
            env={**secrets, "HOME": str(made.parent)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        try:
            code = child.wait(_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"{shown(source)} took more than {_SECONDS} seconds: nothing was kept") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # what it left behind too
            child.wait()
        if code == _KEEPS_NETWORK:
            raise InputError(
                f"{shown(source)} was not run, because this system does not let its network be taken away: convert it "
                f"on Linux with user namespaces or seccomp, or add {NETWORK} to let the program keep the network"
            )
        _check_made(made, most, code, source, _last_line(said))


def _last_line(said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - _SAID))
    lines = said.read(_SAID).decode(errors="replace").strip().splitlines()
    return shortened(lines[-1] if lines else "no reason", 200)


def _check_made(made: Path, most: int, code: int, source: Path, why: str) -> None:
    """Refuses what is no file of a checkpoint's size in the place where the child was to leave one."""
    try:
        about = made.lstat()
    except OSError:
        about = None
    if code or about is None:
        raise InputError(f"{shown(source)} cannot be converted ({why}): nothing was kept")
    if not stat.S_ISREG(about.st_mode) or about.st_size > most:
        what = f"{about.st_size:,} bytes" if stat.S_ISREG(about.st_mode) else "no file"
        raise InputError(f"{shown(source)} left {what} where at most {most:,} bytes of tensors are: nothing was kept")


def _keep(made: Path, source: Path, target: Path) -> dict[str, int]:
    """Reads what the child made as if a stranger had, and writes it anew."""
    from knep.io import checkpoint

    try:
        state = checkpoint.read(made)
    except InputError as error:
        raise InputError(f"{shown(source)} left something else than tensors: nothing was kept") from error
    weights, values, left_out = _parts(state, source)
    if not weights:
        raise InputError(f"{shown(source)} holds no tensors: nothing was kept")
    checkpoint.write({"state_dict": weights, "values": values}, target)
    counts = {"tensors": len(weights), "values": _values(values), "left out": left_out}
    print(
        f"knep: {shown(target)} holds {counts['tensors']} tensors and {counts['values']} plain values; "
        f"{counts['left out']} objects were left out. The new file runs nothing; what the old one did while it was "
        "read cannot be undone"
    )
    return counts


def _parts(state: object, source: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Weights, values and the count of what was left out, of the form in which `_child` writes them."""
    import torch

    found = state if type(state) is dict else {}
    weights, values, left_out = (found.get(key) for key in ("state_dict", "values", "left_out"))
    plain = type(weights) is dict and all(type(k) is str and type(w) is torch.Tensor for k, w in weights.items())
    if (
        not plain
        or type(weights) is not dict
        or type(values) is not dict
        or not _is_plain(values)
        or type(left_out) is not int
        or left_out < 0
    ):
        raise InputError(f"{shown(source)} left something else than tensors and plain values: nothing was kept")
    return weights, values, left_out


def _is_plain(tree: object) -> bool:
    if type(tree) is dict:
        return all(type(k) is str and _is_plain(v) for k, v in tree.items())
    return all(map(_is_plain, tree)) if type(tree) is list else type(tree) in _PLAIN


def _values(tree: object) -> int:
    if isinstance(tree, dict):
        return sum(map(_values, tree.values()))
    return sum(map(_values, tree)) if isinstance(tree, list) else 1


class _Plain:
    """Takes a loaded checkpoint apart: tensors under dotted names, and what is plain of the rest."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.left_out = 0

    def take(self, node: object, path: str = "", depth: int = 0) -> Any:
        import torch

        if isinstance(node, torch.nn.Module):
            node = node.state_dict()
        if isinstance(node, torch.Tensor):
            self.tensors[path or "tensor"] = node.detach().cpu().contiguous().clone()
            return None
        if isinstance(node, _PLAIN):
            return node if type(node) in _PLAIN else str(node)
        if isinstance(node, Mapping) and depth < 20:
            found = {str(k): self.take(v, f"{path}.{k}" if path else str(k), depth + 1) for k, v in node.items()}
            return {k: v for k, v in found.items() if v not in (None, {}, [])}
        if isinstance(node, (list, tuple)) and depth < 20:
            return [self.take(v, f"{path}.{i}" if path else str(i), depth + 1) for i, v in enumerate(node)]
        self.left_out += 1
        return None


def _confined(network: bool, most: int, parent: int) -> None:
    """Gives up what of a process's rights can be given up, and goes on in a child of the process that did.

    Must come before torch is imported, which starts threads: a process of several cannot leave its namespaces.
    """
    import resource

    killed_with(parent)
    for limit, value in ((resource.RLIMIT_FSIZE, most), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    if not network and not take_network():
        os._exit(_KEEPS_NETWORK)
    inner = os.fork()
    if inner:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 0xFF)
    killed_with(os.getppid())


def _child(source: Path, made: Path, most: int, network: bool, parent: int) -> None:
    _confined(network, most, parent)
    import resource

    import torch

    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    loaded = torch.load(source, map_location="cpu", weights_only=False)
    key = next((k for k in ("state_dict", "model") if isinstance(loaded, dict) and k in loaded), None)
    plain = _Plain()
    values = {} if key is None else plain.take({k: v for k, v in loaded.items() if k != key})
    plain.tensors = {}  # an optimizer's, which belong to a run that cannot be gone on from
    plain.take(loaded if key is None else loaded[key])
    torch.save({"state_dict": plain.tensors, "values": values, "left_out": plain.left_out}, made)


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5]))

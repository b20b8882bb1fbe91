"""A place where something is let loose on knep: a forked child, watched, measured and stopped when it takes too long.

Watched are the audit events of Python (PEP 578): programs started, connections opened, files opened or changed outside
the place. Measured is the memory that the child took and asked for beyond what the warm parent had.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree")
_GIT = ("rev-parse", "diff", "config")  # of which `knep.io.git.git` lets none run a program
_READABLE = ("/dev/null", "/proc/", "/sys/", "/etc/mime.types")
_LIMIT_BYTES = 12 << 30


@dataclass(frozen=True)
class Outcome:
    """What a child did. code: exit status, None where it was stopped; grew, asked: bytes of memory beyond the parent's.

    events: what it did that nothing in the place may do.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    grew: int = 0
    asked: int = 0
    events: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


def run(door: Callable[[Sequence[str]], object], arguments: Sequence[str], work: Path, seconds: float = 30) -> Outcome:
    """Calls `door(arguments)` in a forked child whose current folder, home and only place to write is `work`.

    seconds: before the child is stopped, of a core of its own; longer where more processes wait than there are cores.
    """
    report = work.with_name(f"{work.name}.report")
    began = time.perf_counter()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _child(door, arguments, work, report)
    code = _wait(child, began + seconds * _crowd())
    took = time.perf_counter() - began
    out, err = (p.read_text(errors="replace") if p.exists() else "" for p in _outputs(report))
    facts = json.loads(report.read_text()) if report.exists() else {}
    for path in (report, *_outputs(report)):
        path.unlink(missing_ok=True)
    return Outcome(code, out, err, took, facts.get("grew", 0), facts.get("asked", 0), tuple(facts.get("events", ())))


def _outputs(report: Path) -> tuple[Path, Path]:
    return report.with_suffix(".out"), report.with_suffix(".err")


def _crowd() -> float:
    """Processes that wait for a core, per core; at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _wait(child: int, deadline: float) -> int | None:
    while time.perf_counter() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _child(door: Callable[[Sequence[str]], object], arguments: Sequence[str], work: Path, report: Path) -> None:
    """Never returns: runs the door, writes what was seen, and ends the process."""
    code = 1
    try:
        for path, number in zip(_outputs(report), (1, 2), strict=True):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.setsid()
        os.chdir(work)
        os.environ |= {"HOME": str(work), "XDG_CACHE_HOME": str(work / ".cache"), "COLUMNS": "200"}
        sys.dont_write_bytecode = True
        _give_back()
        before = memory()
        most = before["VmSize"] + _LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        with _watched(work) as events:
            code = _call(door, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        after = memory()
        facts = {
            "grew": after["VmHWM"] - before["VmRSS"],
            "asked": after["VmPeak"] - before["VmSize"],
            "events": events[:5],
        }
        report.write_text(json.dumps(facts))
    finally:
        os._exit(code)


def _call(door: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> int:
    try:
        door(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _give_back() -> None:
    """Freed memory that the parent keeps (`utils.memory`) goes to the system, so that what is taken anew is counted."""
    with suppress(OSError, AttributeError):  # of another C library, of another kernel
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here


def memory() -> dict[str, int]:
    """Bytes, by the names of /proc/self/status: VmPeak and VmSize asked for, VmHWM and VmRSS taken."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}


@contextmanager
def _watched(work: Path) -> Iterator[list[str]]:
    """The forbidden events while the block runs; Python has no way to take an audit hook off again."""
    events: list[str] = []
    on = [True]
    inside = str(work.resolve())

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if on[0] and (said := _forbidden(event, args, inside)):
            events.append(said)

    sys.addaudithook(hook)
    try:
        yield events
    finally:
        on[0] = False


def _forbidden(event: str, args: tuple[Any, ...], inside: str) -> str:
    if event == "socket.connect" and args[0].family == socket.AF_UNIX:
        return ""  # workers that hand over batches
    if event in _CODE:
        git = event == "subprocess.Popen" and list(args[1])[:1] == ["git"] and args[1][1] in _GIT
        return "" if git else f"{event} {args[0]}"
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(args[0]))
        changes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        secret = path.endswith("/secret")
        return f"open {path}" if _outside(path, inside) and (changes or secret) else ""
    if event in _CHANGES:
        paths = [os.path.abspath(os.fsdecode(a)) for a in args[:2] if isinstance(a, (str, bytes, os.PathLike))]
        return next((f"{event} {path}" for path in paths if _outside(path, inside)), "")
    return ""


def _outside(path: str, inside: str) -> bool:
    return not (path == inside or path.startswith((f"{inside}/", *_READABLE)))

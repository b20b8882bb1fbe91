"""Two network namespaces that stand for two hosts: one process each by torchrun, a cut cable, a killed host.

`sudo python -m tests.exhaustive.two_hosts` trains (1) two processes on one host, (2) the same on two hosts, (3) on two
hosts whose cable is cut, (4) on two hosts of which one is killed; (3) and (4) are then gone on with. All weights must
be the same to the bit, and whoever is left must end within 30 s with the other's rank and address.

A stand-in: the namespaces have a network of their own (veth, 10.231.0.0/30), and share the processor, the clock and the
file system that real hosts would share by NFS. Needs root and `ip` (iproute2). Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.exhaustive.traces import difference, traces

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 30.0  # seconds that a process may go on after the other has died
PORT = 29531
LINES = (
    "recipe=none",
    "trainer=ddp_sim",
    "trainer.precision=32-true",
    "trainer.max_epochs=4",
    "data.batch_size=16",
    "dropout=standard",
    "progress=false",
    "threads=1",
    "checkpoint.every=20",
)


class Hosts:
    """The namespaces and their cable; runs of both hosts. cut, mend: take the cable out, and put it back."""

    def __init__(self) -> None:
        self.names = [f"knep{os.getpid()}{side}" for side in "ab"]
        self.links = [f"kn{os.getpid() % 10**6}{side}" for side in "ab"]

    def build(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for i, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"10.231.0.{i + 1}/30", "dev", link)
        self.mend()

    def mend(self) -> None:
        for name, link in zip(self.names, self.links, strict=True):
            _ip("-n", name, "link", "set", link, "up")

    def cut(self) -> None:
        _ip("-n", self.names[1], "link", "set", self.links[1], "down")

    def kill(self, host: int) -> None:
        """SIGKILL to all processes of a host."""
        for pid in _ip("netns", "pids", self.names[host]).split():
            subprocess.run(["kill", "-9", pid], check=False)

    def remove(self) -> None:
        for host, name in enumerate(self.names):
            self.kill(host)
            _ip("netns", "del", name)

    def start(self, folder: Path, more: Sequence[str] = ()) -> list[subprocess.Popen]:
        """One process on each host, by torchrun; what they say goes to host_<n>.txt beside the run folder."""
        started = []
        for i, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={i}", "--nproc-per-node=1"]
            place = ["--master-addr=10.231.0.1", f"--master-port={PORT}"]
            train = [str(ROOT / "train.py"), *LINES, "trainer.devices=1", "trainer.num_nodes=2"]
            command = [sys.executable, *torchrun, *place, *train, *more, f"hydra.run.dir={folder}"]
            with (folder.parent / f"{folder.name}_host_{i}.txt").open("a") as said:
                env = _environment() | {"GLOO_SOCKET_IFNAME": link}
                started.append(
                    subprocess.Popen(["ip", "netns", "exec", name, *command], stdout=said, stderr=said, env=env)
                )
        return started


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts for a while."""
    hosts = Hosts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go too
    try:
        hosts.build()
        yield hosts
    finally:
        hosts.remove()


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def ended(processes: Sequence[subprocess.Popen], seconds: float) -> bool:
    """Whether all of them ended in time; those that did not are killed."""
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
    return True


def on_one_host(folder: Path) -> None:
    """The same run on two processes of this host."""
    command = [sys.executable, str(ROOT / "train.py"), *LINES, f"hydra.run.dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment())


def _said(folder: Path, host: int) -> str:
    """The line in which a host names the process that died."""
    lines = (folder.parent / f"{folder.name}_host_{host}.txt").read_text().splitlines()
    return next((line for line in lines if line.startswith("knep: ") and " died (" in line), "")


def _worker_lives(hosts: Hosts, host: int) -> bool:
    """Whether the training process of a host runs, whatever torchrun does around it."""
    for pid in _ip("netns", "pids", hosts.names[host]).split():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "train.py" in command and "torch.distributed.run" not in command:
            return True
    return False


def broken(hosts: Hosts, folder: Path, how: str) -> tuple[list[float], list[str]]:
    """A run that is broken after its first checkpoint: seconds until each host left had ended, and what it said."""
    processes = hosts.start(folder)
    while not (folder / "checkpoints" / "last.ckpt").exists() and processes[0].poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    left = [0] if how == "killed" else [0, 1]
    if how == "killed":
        hosts.kill(1)
    else:
        hosts.cut()
    began, seconds = time.monotonic(), {}
    while len(seconds) < len(left) and time.monotonic() - began < 2 * LIMIT:
        for host in left:
            if host not in seconds and not _worker_lives(hosts, host):
                seconds[host] = time.monotonic() - began
        time.sleep(0.2)
    hosts.mend()
    for host in (0, 1):
        hosts.kill(host)
    for process in processes:
        process.wait()
    return [seconds.get(host, float("inf")) for host in left], [_said(folder, host) for host in left]


def main() -> None:
    if os.geteuid():
        sys.exit("two_hosts makes network namespaces, which only root may: run it with sudo")
    if shutil.which("ip") is None:
        sys.exit("two_hosts needs the command ip: apt-get install iproute2")
    good = True

    def tell(name: str, outcome: str, fine: bool) -> None:
        nonlocal good
        good = good and fine
        print(f"{name:34} {outcome}", flush=True)

    with tempfile.TemporaryDirectory() as place, two_hosts() as hosts:
        whole = Path(place) / "whole"
        on_one_host(whole)
        expected = traces(whole)
        for how in ("undisturbed", "cut", "killed"):
            folder = Path(place) / how
            if how != "undisturbed":
                seconds, lines = broken(hosts, folder, how)
                for line, rest in zip(lines, seconds, strict=True):
                    tell(f"{how}: ends", f"after {rest:.1f} s, {line or 'without a word'}", bool(line) and rest < LIMIT)
            processes = hosts.start(folder, [f"ckpt={folder}"] if how != "undisturbed" else [])
            done = ended(processes, 300) and not any(process.returncode for process in processes)
            outcome = difference(expected, traces(folder)) if done else "fails: does not end"
            tell(f"{how}: compared with one host", outcome, outcome == "identical")
    sys.exit(not good)


if __name__ == "__main__":
    main()

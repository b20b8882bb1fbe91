"""Who of several processes still lives: a word each second over sockets of their own, beside the collectives.

Collectives do not say it: a killed process is a closed connection without a rank to them, one behind a cut cable is
nothing at all for half an hour. Rank 0 hears all others, and passes on what it finds.
"""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PERIOD = 1.0  # seconds between two words
SILENCE = 15.0  # seconds without one after which a process counts as dead
GRACE = 5.0  # seconds that a process has to end by itself once it knows of a death
LEAVE = 2.0  # seconds in which the others hear that a process takes leave
_JOIN = 60.0  # seconds within which all processes must have found rank 0
_LINE = 4096


@dataclass(frozen=True)
class Death:
    """A process that is no more; why: what was seen of it."""

    rank: int
    why: str
    address: str = ""

    def line(self, world: int) -> str:
        place = f" at {self.address}" if self.address else ""
        return f"rank {self.rank} of {world}{place} died ({self.why})"


@dataclass
class _Link:
    """A connection to another process; heard: when its last word came."""

    socket: socket.socket
    address: str
    heard: float = field(default_factory=time.monotonic)
    rest: bytes = b""


class Heartbeat:
    """Tells of the first of the other processes that dies.

    give_up: called with the death where the process has not ended by itself `GRACE` seconds later.
    children: processes that this one started, as (rank, process); parent: the id of the one that started this one.
    """

    def __init__(self, give_up: Callable[[Death], None]) -> None:
        self.death: Death | None = None
        self.known = threading.Event()
        self.children: list[tuple[int, subprocess.Popen]] = []
        self.parent: int | None = None
        self._give_up = give_up
        self._answered = threading.Event()
        self._ended = threading.Event()
        self._links: dict[int, _Link] = {}
        self._parted: set[int] = set()  # those that took leave
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="knep-heartbeat", daemon=True)

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()

    def join(self, rank: int, world: int, host: str, share: Callable[[Any], Any]) -> None:
        """Connects the processes; share: gives rank 0's value to all. Raises OSError where one cannot be reached."""
        if rank:
            port, token = share(None)
            link = socket.create_connection((host, port), timeout=_JOIN)
            link.sendall(f"{token} {rank}\n".encode())
            self._add(0, link, host)
            return
        with _server(host) as server:
            server.settimeout(_JOIN)
            token = secrets.token_hex(16)
            share((server.getsockname()[1], token))
            while len(self._links) < world - 1:
                link, (address, *_) = server.accept()
                other = _greeting(link, token)
                if 0 < other < world:
                    self._add(other, link, address)
                else:
                    link.close()

    def _add(self, rank: int, link: socket.socket, address: str) -> None:
        link.settimeout(PERIOD)
        self._links[rank] = _Link(link, "" if address.startswith(("127.", "::1", "localhost")) else address)
        self._selector.register(link, selectors.EVENT_READ, rank)

    def answer(self, seconds: float) -> Death | None:
        """The death that explains an error of this process, waited for so long; the process will now end by itself."""
        self.known.wait(seconds)
        if self.death:
            self._answered.set()
        return self.death

    def end(self, reason: str = "") -> None:
        """Takes leave of the others: `reason` for a failure of this process, none where all has gone well."""
        self._ended.set()
        self._say(f"failed {' '.join(reason.split())[:500]}" if reason else "bye")
        if 0 in self._links and self._thread.is_alive():
            self._thread.join(LEAVE)  # what is left unread when a socket closes takes the last word with it

    def _say(self, text: str) -> None:
        for link in list(self._links.values()):
            try:
                link.socket.sendall(f"{text}\n".encode())
            except OSError:
                continue  # whoever does not listen is noticed by its silence

    def _run(self) -> None:
        while not self._ended.is_set() and self.death is None:
            self._say(".")
            self._listen(PERIOD)
            self._look()
        if self.death and not self._ended.is_set():
            self.known.set()
            self._say(f"gone {self.death.rank} {self.death.why}")
            if not self._answered.wait(GRACE):
                self._give_up(self.death)
        end = time.monotonic() + LEAVE
        while self._links and time.monotonic() < end:
            self._listen(LEAVE)
        for _, child in self.children:
            child.wait()  # or it would stay as a zombie

    def _listen(self, seconds: float) -> None:
        if self._links:
            for key, _ in self._selector.select(seconds):
                self._hear(key.data)
        else:
            self._ended.wait(seconds / 4)

    def _hear(self, rank: int) -> None:
        link = self._links.get(rank)
        if link is None:
            return
        try:
            got = link.socket.recv(_LINE)
        except OSError:
            got = b""
        if not got:
            self._lose(rank, self._ending(rank) or "its connection closed")
            return
        link.heard = time.monotonic()
        *lines, link.rest = (link.rest + got)[-_LINE:].split(b"\n")
        for line in lines:
            self._understand(rank, line.decode(errors="replace"))

    def _understand(self, rank: int, line: str) -> None:
        word, _, text = line.partition(" ")
        if word == "bye":
            self._parted.add(rank)
            self._forget(rank)
        elif word == "failed":
            self._lose(rank, text)
        elif word == "gone" and rank == 0 and text.split(" ")[0].isdigit():
            other, _, why = text.partition(" ")
            self._lose(int(other), why)

    def _look(self) -> None:
        """At what does not announce itself: silence, and processes that ended before they were connected."""
        now = time.monotonic()
        for rank, link in list(self._links.items()):
            if now - link.heard > SILENCE:
                self._lose(rank, f"no word from it for {SILENCE:.0f} s")
        for rank, _ in self.children:
            ending = "" if rank in self._parted else self._ending(rank)
            if ending:
                self._lose(rank, ending)
        if self.parent not in (None, os.getppid()) and 0 not in self._parted:
            self._lose(0, "its process is no more")

    def _ending(self, rank: int) -> str:
        """How a child came to its end, where that was no good one."""
        for other, child in self.children:
            if other == rank:
                for _ in range(20):  # its connections close a moment before it can be waited for
                    if child.poll() is not None or rank not in self._links:
                        break
                    time.sleep(0.01)
                code = child.poll() or 0
                return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}" if code else ""
        return ""

    def _forget(self, rank: int) -> str:
        link = self._links.pop(rank, None)
        if link is None:
            return ""
        self._selector.unregister(link.socket)
        link.socket.close()
        return link.address

    def _lose(self, rank: int, why: str) -> None:
        address = self._forget(rank)
        if self.death is None and not self._ended.is_set():
            self.death = Death(rank, why, address)


def _server(host: str) -> socket.socket:
    """Listens at this host's address, or at all of them where its name is that of a router before it."""
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((host, 0), family=family)
    except OSError:
        return socket.create_server(("", 0), family=family)


def _greeting(link: socket.socket, token: str) -> int:
    """The rank of a process that knows the token; 0 for anybody else."""
    link.settimeout(PERIOD)
    got = b""
    try:
        while b"\n" not in got and len(got) < _LINE:
            more = link.recv(1)  # the words behind the greeting are left for the thread
            if not more:
                return 0
            got += more
    except OSError:
        return 0
    said, _, rank = got.partition(b"\n")[0].partition(b" ")
    return int(rank) if hmac.compare_digest(said, token.encode()) and rank.isdigit() else 0

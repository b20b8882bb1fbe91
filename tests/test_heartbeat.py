"""Processes notice each other's death, and say whose it was."""

import os
import signal
import socket
import threading
import time

import pytest

from knep.distributed import heartbeat
from knep.distributed.heartbeat import Heartbeat


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "PERIOD", 0.05)
    monkeypatch.setattr(heartbeat, "SILENCE", 10.0)
    monkeypatch.setattr(heartbeat, "GRACE", 0.3)


class Shared:
    """What a broadcast does, for threads of one process and children that it forks."""

    def __init__(self):
        self._read, self._write = os.pipe()

    def give(self, value):
        for _ in range(3):
            os.write(self._write, f"{value[0]} {value[1]}\n".encode().ljust(64))
        return value

    def take(self, _):
        port, token = os.read(self._read, 64).decode().split()
        return int(port), token


def other(shared, rank, world, then):
    """A process of that rank in a child, which joins and does `then`; returns its id."""
    child = os.fork()
    if not child:
        beat = Heartbeat(lambda death: os._exit(40 + death.rank))
        beat.start()
        beat.join(rank, world, "127.0.0.1", shared.take)
        then(beat)
        time.sleep(20)
        os._exit(0)
    return child


def leader(shared, world):
    beat = Heartbeat(lambda death: None)
    beat.start()
    beat.join(0, world, "127.0.0.1", shared.give)
    return beat


def ended(child, signals=()):
    for number in signals:
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_killed_process_is_named_to_all_that_are_left():
    shared = Shared()
    first, second = (other(shared, rank, 3, lambda beat: None) for rank in (1, 2))
    beat = leader(shared, 3)
    began = time.monotonic()
    assert ended(first, [signal.SIGKILL]) == -signal.SIGKILL
    death = beat.answer(10)
    assert death.line(3) == "rank 1 of 3 died (its connection closed)"
    assert ended(second) == 41  # told by rank 0, given up on after the grace
    assert time.monotonic() - began < 5


def test_the_first_one_is_missed_by_the_others():
    shared = Shared()
    child = os.fork()
    if not child:
        leader(shared, 2)
        time.sleep(20)
        os._exit(0)
    beat = Heartbeat(lambda death: None)
    beat.start()
    beat.join(1, 2, "127.0.0.1", shared.take)
    ended(child, [signal.SIGKILL])
    assert beat.answer(10).rank == 0


def test_silence_counts_as_death(monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE", 1.0)
    shared = Shared()
    child = other(shared, 1, 2, lambda beat: None)
    beat = leader(shared, 2)
    os.kill(child, signal.SIGSTOP)
    assert beat.answer(10).line(2) == "rank 1 of 2 died (no word from it for 1 s)"
    ended(child, [signal.SIGKILL])


def test_leave_is_no_death_and_a_reason_is_passed_on():
    shared = Shared()
    child = other(shared, 1, 2, lambda beat: (beat.end(), os._exit(3)))
    beat = leader(shared, 2)
    assert ended(child) == 3
    assert beat.answer(0.5) is None
    beat.end()

    shared = Shared()
    child = other(shared, 1, 2, lambda beat: (beat.end("ValueError: no\nsuch image"), os._exit(3)))
    beat = leader(shared, 2)
    assert beat.answer(10).line(2) == "rank 1 of 2 died (ValueError: no such image)"
    ended(child)


def test_nobody_joins_without_the_token():
    shared, met = Shared(), {}
    thread = threading.Thread(target=lambda: met.update(beat=leader(shared, 2)))
    thread.start()
    port, token = shared.take(None)
    for said in (b"wrong 1\n", f"{token} 7\n".encode(), b"x" * 9000):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(said)
            stranger.settimeout(10)
            try:
                assert stranger.recv(10) == b""
            except ConnectionResetError:
                continue
    beat = Heartbeat(lambda death: None)
    beat.join(1, 2, "127.0.0.1", lambda _: (port, token))
    thread.join(10)
    assert list(met["beat"]._links) == [1]
    met["beat"].end()

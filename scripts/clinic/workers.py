"""Child processes that work through cases: one that crashes or hangs is replaced, and the case says so."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")


class Worker:
    """One child; `ask` gives work(item), or {"failure": why} after a crash, an error or `limit` seconds."""

    def __init__(self, work: Callable[[Any], Any], limit: float) -> None:
        self._work, self._limit = work, limit
        self._process: BaseProcess | None = None
        self._pipe: Any = None

    def _start(self) -> None:
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, self._work), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.recv() == "ready"

    def ask(self, item: Any) -> Any:
        if self._process is None:
            self._start()
        try:
            self._pipe.send(item)
            if not self._pipe.poll(self._limit):
                self.close()
                return {"failure": f"no answer within {self._limit:.0f} s"}
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return {"failure": f"the process died with exit code {self.close()}"}

    def close(self) -> int | None:
        """Ends the child, waiting a moment for one that is ending by itself; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.join(1)
        process.kill()
        process.join()
        return process.exitcode


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    pipe.send("ready")
    while True:
        item = pipe.recv()
        try:
            answer = work(item)
        except Exception as error:  # whatever a doctor raises is recorded, never the end of the clinic
            text = " ".join(str(error).split())[:300]
            answer = {"failure": f"{type(error).__name__}: {text}"}
        pipe.send(answer)


def each(work: Callable[[Any], Any], items: Iterable[Any], processes: int, limit: float) -> Iterator[tuple[Any, Any]]:
    """(item, work(item)) as they come, in so many child processes."""
    mine = threading.local()
    workers: list[Worker] = []

    def ask(item: Any) -> tuple[Any, Any]:
        if not hasattr(mine, "worker"):
            mine.worker = Worker(work, limit)
            workers.append(mine.worker)
        return item, mine.worker.ask(item)

    try:
        with ThreadPoolExecutor(processes) as threads:
            for done in as_completed([threads.submit(ask, item) for item in items]):
                yield done.result()
    finally:
        for worker in workers:
            worker.close()

"""Several processes that train one model, and how they end when one of them dies: with one line that names it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from knep.distributed.heartbeat import GRACE, SILENCE, Death, Heartbeat
from knep.errors import InputError, Interrupted, RunFailed
from knep.io.run_folder import read_summary, write_summary
from knep.utils.orphans import LAUNCHER, ends_with_parent, spared
from knep.utils.text import shown

_LAST = SILENCE / 2  # seconds after its launcher's end in which a process has named it, and after which it ends


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine; the heartbeat watches them.

    Lightning's own launcher ends all processes by SIGKILL when one has ended, without a word and without a summary.
    """

    def __init__(self, before: _SubprocessScriptLauncher, heartbeat: Heartbeat) -> None:
        super().__init__(before.cluster_environment, before.num_processes, before.num_nodes)
        self._heartbeat = heartbeat

    def launch(self, function: Callable[..., Any], *args: object, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        if LAUNCHER in os.environ and self.cluster_environment.local_rank():
            self._heartbeat.parent = int(os.environ[LAUNCHER])
            if self.cluster_environment.global_rank() == 1:  # who tells of the death of rank 0, see `Watch.tell`
                spared()
                ends_with_parent(self._heartbeat.parent, _LAST)
        self._heartbeat.start()
        return super().launch(function, *args, trainer=trainer, **kwargs)

    def _call_children_scripts(self) -> None:
        os.environ[LAUNCHER] = str(os.getpid())
        super()._call_children_scripts()
        first = self.cluster_environment.node_rank() * self.num_processes + 1
        self._heartbeat.children = list(enumerate(self.procs, first))
        self.procs = []  # what Lightning's observer would watch

    def kill(self, signum: int) -> None:
        for _, child in self._heartbeat.children:
            child.send_signal(signum)


class Watch(Callback):
    """Joins the processes' heartbeats once they are connected. folder: of the run, for the summary of its failure."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.heartbeat = Heartbeat(self._give_up)
        self._untold = threading.Lock()
        self._folder, self._world, self._rank = folder, trainer.world_size, trainer.global_rank
        strategy: Any = trainer.strategy
        if isinstance(strategy.launcher, _SubprocessScriptLauncher):
            strategy._launcher = Launcher(strategy.launcher, self.heartbeat)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(str(self._folder))
        if Path(folder).resolve() != self._folder.resolve():
            raise RunFailed(
                f"rank {self._rank} writes to {self._folder} and rank 0 to {folder}: write hydra.run.dir=FOLDER"
            )
        self.heartbeat.start()
        self.heartbeat.join(self._rank, self._world, os.environ["MASTER_ADDR"], trainer.strategy.broadcast)

    def tell(self, death: Death) -> None:
        """One of the processes that are left says whose death it was, on stderr and in the summary, once.

        At once, because torchrun sends SIGTERM to all that are left.
        """
        if self._rank != (0 if death.rank else 1) or not self._untold.acquire(blocking=False):
            return
        line = f"{death.line(self._world)}: go on with ckpt={self._folder}"
        print(f"knep: {shown(line)}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # no room for the summary: the death is what is to be told
            write_summary(self._folder, {**read_summary(self._folder), "status": "failed", "reason": line})

    def _give_up(self, death: Death) -> None:
        """Ends a process that waits in a collective for one that is no more."""
        self.tell(death)
        for _, child in self.heartbeat.children:
            child.kill()
            child.wait()
        os._exit(1)


def watch(trainer: Trainer, folder: Path) -> None:
    """Watches over the other processes of `trainer`, where it has some; folder: of the run or of one of its members."""
    if trainer.world_size > 1:
        run = folder.parent if folder.name.startswith("member_") else folder
        trainer.callbacks.insert(0, Watch(trainer, run))  # type: ignore[attr-defined]


@contextlib.contextmanager
def deaths_named(trainer: Trainer) -> Iterator[None]:
    """What happens within because another process died ends this one with a line that names it, and exit code 1."""
    watches = [c for c in trainer.callbacks if isinstance(c, Watch)]  # type: ignore[attr-defined]
    if not watches:
        yield
        return
    heartbeat = watches[0].heartbeat
    try:
        yield
    except Interrupted:
        heartbeat.end()
        raise
    except (InputError, RunFailed) as error:
        heartbeat.end(str(error))
        raise
    except Exception as error:
        # An error of this process alone is its own: only where a collective failed may another one be behind it.
        death = heartbeat.answer(SILENCE + GRACE if _of_a_collective(error) else 0)
        if death is None:
            heartbeat.end(f"{type(error).__name__}: {error}")
            raise
        watches[0].tell(death)
        raise SystemExit(1) from error
    else:
        heartbeat.end()


def _of_a_collective(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "distributed", "dist", "socket", "peer"))

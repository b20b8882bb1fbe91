"""Several processes that train one model, and how they end when one of them dies: with one line that names it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from knep.errors import InputError, RunFailed
from knep.files import read_summary, write_summary
from knep.heartbeat import GRACE, SILENCE, Death, Heartbeat
from knep.signals import Interrupted

_LAUNCHER = "KNEP_LAUNCHER"  # tells a process that this package started the id of the one that did


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine; the heartbeat watches them.

    Lightning's own launcher ends all processes by SIGKILL when one has ended, without a word and without a summary.
    """

    def __init__(self, before: _SubprocessScriptLauncher, heartbeat: Heartbeat) -> None:
        super().__init__(before.cluster_environment, before.num_processes, before.num_nodes)
        self._heartbeat = heartbeat

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        if _LAUNCHER in os.environ and self.cluster_environment.local_rank():
            self._heartbeat.parent = int(os.environ[_LAUNCHER])
        self._heartbeat.start()
        return super().launch(function, *args, trainer=trainer, **kwargs)

    def _call_children_scripts(self) -> None:
        os.environ[_LAUNCHER] = str(os.getpid())
        super()._call_children_scripts()
        first = self.cluster_environment.node_rank() * self.num_processes + 1
        self._heartbeat.children = list(enumerate(self.procs, first))
        self.procs = []  # what Lightning's observer would watch

    def kill(self, signum: Any) -> None:
        for _, child in self._heartbeat.children:
            child.send_signal(signum)


class Watch(Callback):
    """Joins the processes' heartbeats once they are connected. folder: of the run, for the summary of its failure."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.heartbeat = Heartbeat(self._give_up)
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

    def failure(self, death: Death) -> BaseException:
        """What this process ends with: one of those left tells of the death, the others go in silence."""
        line = f"{death.line(self._world)}: go on with ckpt={self._folder}"
        if self._rank != (0 if death.rank else 1):
            return SystemExit(1)
        if self._rank:  # rank 0 writes the summary of what it ends with by itself
            self._tell(line)
        return RunFailed(line)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # no room for the summary: the death is what is to be told
            write_summary(self._folder, {**read_summary(self._folder), "status": "failed", "reason": line})

    def _give_up(self, death: Death) -> None:
        """Ends a process that waits in a collective for one that is no more."""
        failure = self.failure(death)
        if isinstance(failure, RunFailed):
            self._tell(str(failure))
            print(f"knep: {failure}", file=sys.stderr, flush=True)
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
    """What happens within because another process died becomes RunFailed, which names it."""
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
        raise watches[0].failure(death) from error
    else:
        heartbeat.end()


def _of_a_collective(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "distributed", "dist", "socket", "peer"))

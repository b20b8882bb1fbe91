"""The jobs that Hydra calls: one run, or those of a sweep, each afresh or going on where an earlier one ended."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from knep import train
from knep.compose import plain
from knep.errors import InputError, RunFailed
from knep.files import discard
from knep.resume import find_begun, find_ended, resumes, root_of
from knep.safe import take_allowed
from knep.slurm import requeue
from knep.sweep import Outcomes
from knep.typed import path_typed, quoted


def earlier_lines(config: Mapping[str, Any], arguments: Sequence[str]) -> list[str]:
    """The override lines by which a run goes on with an earlier one of its config; none where it starts afresh.

    arguments: of the command line, which may name the run's folder.
    """
    if not resumes(config, sweep=False):
        return []
    found = find_begun(config, root_of(Path(path_typed(arguments, "hydra.run.dir") or "outputs")))
    if found is None:
        return []
    print(f"knep: resume=auto: going on with {found}")
    return [f"ckpt={quoted(str(found))}", f"hydra.run.dir={quoted(str(found))}"]


class Single:
    """One run. Hydra prints a paragraph for an exception that leaves a job: it is kept, and raised when Hydra is done.

    The jobs of these classes return what sweepers optimise: the best validation loss.
    """

    error: InputError | RunFailed | None = None

    def job(self, cfg: Any) -> float:
        folder, config, choices, lines = _job(cfg)
        try:
            return float(_told(config, folder, choices, lines)["val/loss"])
        except (InputError, RunFailed) as error:
            self.error = error
            return float("inf")

    def end(self) -> None:
        if self.error:
            raise self.error


class Sweep:
    """Jobs one after the other. Those that came to an end before are listed, those that began go on."""

    def __init__(self, jobs: list[list[str]]) -> None:
        self._taken, self._folder = Outcomes(jobs), Path()

    def job(self, cfg: Any) -> float:
        fresh, config, choices, lines = _job(cfg)
        self._folder = Path(HydraConfig.get().sweep.dir)
        if not resumes(config, sweep=True):
            return self._taken.take(fresh, lambda: _told(config, fresh, choices, lines))
        root = root_of(self._folder)
        ended, begun = find_ended(config, root), find_begun(config, root)
        if ended or begun:
            discard(fresh)
        if ended:
            print(f"knep: {' '.join(lines)}: has ended before, in {ended['folder']} (resume=false runs it again)")
            return self._taken.take(fresh, lambda: ended)
        if begun is None:
            return self._taken.take(fresh, lambda: _told(config, fresh, choices, lines))
        print(f"knep: resume=auto: going on with {begun}")
        return self._taken.take(begun, lambda: _told(config | {"ckpt": str(begun)}, begun, choices, lines))

    def end(self) -> None:
        if not self._taken.rows:
            return  # Hydra itself was refused
        self._taken.tell(self._folder)
        if self._taken.failed and sys.exc_info()[0] is None:
            raise SystemExit(1)


def _job(cfg: Any) -> tuple[Path, dict[str, Any], dict[str, str], list[str]]:
    """A Hydra job's folder, config, choices and override lines."""
    hydra_cfg = HydraConfig.get()
    choices = {k: str(v) for k, v in hydra_cfg.runtime.choices.items() if "/" not in k and "@" not in k}
    config = plain(cfg)
    take_allowed(config)
    return Path(hydra_cfg.runtime.output_dir), config, choices, list(hydra_cfg.overrides.task)


def _told(config: dict[str, Any], folder: Path, choices: dict[str, str], lines: list[str]) -> dict[str, Any]:
    """`run` for a command: input that is refused leaves no folder, and a signal ends the process with its code."""
    try:
        summary = train.run(config, folder, choices, lines)
    except InputError:
        discard(folder)
        raise
    if summary["status"] == "interrupted":
        from knep.signals import exit_code  # brings Lightning, which `--cfg` does without

        if config["slurm"]["requeue"] and summary["signal"] != signal.SIGINT and not summary.get("worker"):
            requeue()
        raise SystemExit(exit_code(summary["signal"]))
    return summary

"""The jobs that Hydra calls: one run, or those of a sweep, each afresh or going on where an earlier one ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, read_write

from knep.config.command_line.aliases import quoted, unquoted
from knep.config.compose import plain
from knep.config.instantiate import allow_typed, take_allowed
from knep.config.schema import RunConfig
from knep.distributed.slurm import requeue
from knep.distributed.torchrun import started_apart, under_torchrun
from knep.errors import InputError, RunFailed
from knep.io.lock import claimed, in_use
from knep.io.run_folder import standing
from knep.io.run_names import link_job, name_job
from knep.io.untrusted_folder import check_written
from knep.run.resume import Run, earlier_runs, find_begun, find_ended, resumes, root_of
from knep.run.run import check, run
from knep.run.sweep import Outcomes
from knep.run.sweep_space import space
from knep.utils.orphans import ends_with_parent
from knep.utils.text import shown

if TYPE_CHECKING:
    from knep.config.compose import Composed


def run_lines(made: Composed, overrides: Sequence[str]) -> list[str]:
    """The override lines that say where a run goes: on with an earlier one of its config, or a folder of its own.

    overrides: of the command line; a folder that they name is left to them.
    """
    earlier = _earlier_lines(made.config, overrides)
    if earlier or _named("hydra.run.dir", overrides) or (started_apart() and not under_torchrun()):
        return earlier
    return [_line("hydra.run.dir", claimed(Path(made.folder)))]


def _named(key: str, overrides: Sequence[str]) -> str | None:
    """The folder that the user names; one whose name is the time of day is as good as none."""
    typed = [line.partition("=")[2] for line in overrides if line.partition("=")[0] == key]
    return unquoted(typed[-1]) if typed and "${now" not in typed[-1] else None


def _line(key: str, folder: Path) -> str:
    return f"{key}={quoted(str(folder))}"


def _earlier_lines(config: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    if not resumes(RunConfig.of(config).resume, sweep=False):
        return []
    root = root_of(Path(_named("hydra.run.dir", overrides) or "outputs"))
    found = find_begun(earlier_runs(config, root))
    if found is None:
        return []
    print(f"knep: resume=auto: going on with {shown(found)}")
    return [_line("ckpt", found), _line("hydra.run.dir", found)]


# What Hydra raises for a folder that it cannot make.
UNWRITABLE = (NotADirectoryError, FileNotFoundError, PermissionError, FileExistsError)


class Single:
    """One run. Hydra prints a paragraph for an exception that leaves a job: it is kept, and raised when Hydra is done.

    The jobs of these classes return what sweepers optimise: the best validation loss.
    """

    error: InputError | RunFailed | None = None

    def job(self, cfg: DictConfig) -> float:
        folder, config, choices, lines = _job(cfg)
        try:
            return float(_told(config, folder, choices, lines)["val/loss"])
        except (InputError, RunFailed) as error:
            self.error = error
            return float("inf")

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        yield
        if self.error:
            raise self.error


class Sweep:
    """Jobs, in whatever processes the launcher runs them. Those that ended before are listed, those that began go on.

    typed: the overrides that a user wrote; script: what the command runs, with its options; search: its further config
    folders.
    """

    def __init__(self, outcomes: Outcomes, checked: bool, typed: list[str], script: list[str], search: list[str]):
        self._taken, self._checked, self._process = outcomes, checked, os.getpid()
        self._typed, self._script, self._search = typed, script, search

    @classmethod
    def planned(
        cls, overrides: list[str], typed: list[str], options: list[str], search: list[str]
    ) -> tuple[Sweep, list[str], Path]:
        """The sweep of a command line, checked; its overrides as Hydra is to read them; what of its folder is there.

        overrides: those of `ckpt=` among them; options: of the command.
        """
        planned = space(overrides, search)
        for job in planned.jobs:
            check(job, search, sweep=True)
        if planned.folder.is_dir():
            for place in (planned.folder, *(path for path in planned.folder.iterdir() if path.is_dir())):
                check_written(place)
        stands = standing(planned.folder)
        folder = planned.folder if _named("hydra.sweep.dir", overrides) else claimed(planned.folder)
        outcomes = Outcomes(folder, planned.fixed, planned.jobs if planned.grid else ())
        script = [sys.argv[0], *(word for word in options if word not in ("-m", "--multirun"))]
        whole = [*planned.overrides, _line("hydra.sweep.dir", folder)]
        return cls(outcomes, planned.grid, typed, script, search), whole, stands

    def job(self, cfg: DictConfig) -> float:
        if os.getppid() == self._process:  # a launcher's worker
            ends_with_parent(self._process)
        hydra_cfg = HydraConfig.get()
        lines, fresh = list(hydra_cfg.overrides.task), Path(hydra_cfg.runtime.output_dir)
        return self._taken.take(hydra_cfg.job.num, lines, fresh, lambda runs_in: self._run(cfg, lines, fresh, runs_in))

    def _run(self, cfg: DictConfig, lines: list[str], fresh: Path, runs_in: Callable[[Path], None]) -> dict[str, Any]:
        allow_typed(self._typed)  # in a process of the launcher's nobody has
        if not self._checked:
            check(lines, self._search, sweep=True)
        _, config, choices, _ = _job(cfg)
        runs = self._earlier(config)
        own = self._taken.own(lines)
        name_job(fresh, own)
        ended, begun = find_ended(runs), find_begun([run for run in runs if not in_use(run[0])])
        ran = Path(ended["folder"]) if ended else begun
        if ran is not None:
            link_job(fresh, own, ran)
        if ended:
            where = f"{' '.join(lines)}: has ended before, in {ended['folder']}"
            print(f"knep: {shown(where)} (resume=false runs it again)")
            return ended
        if begun is None:
            with self._alone(lines, fresh):
                return _told(config, fresh, choices, lines)
        print(f"knep: resume=auto: going on with {shown(begun)}")
        runs_in(begun)
        with self._alone([*lines, _line("ckpt", begun)], begun):
            return _told(config | {"ckpt": str(begun)}, begun, choices, lines)

    def _earlier(self, config: Mapping[str, Any]) -> list[Run]:
        """The runs that may stand for a job: of sweeps, or with resume=auto any."""
        if not resumes(RunConfig.of(config).resume, sweep=True):
            return []
        return earlier_runs(config, root_of(self._taken.folder), jobs_only=config["resume"] is None)

    @contextlib.contextmanager
    def _alone(self, lines: list[str], folder: Path) -> Iterator[None]:
        """Within, the command is that of this job alone, as the further processes of its training start it again."""
        whole: Any = HydraConfig.instance().cfg
        before = sys.argv
        with read_write(whole.hydra):
            whole.hydra.run.dir = str(folder)
        sys.argv = [self._script[0], *lines, *self._script[1:]]
        try:
            yield
        finally:
            sys.argv = before

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Tells of all jobs when Hydra is done with them, however that was. SystemExit where some did not end."""
        with self._taken.open():
            try:
                yield
            except (InputError, RunFailed, HydraException, *UNWRITABLE):
                raise
            except Exception as error:
                raise self._early(error) from error
            finally:
                failed = self._taken.tell()
        if failed:
            raise SystemExit(1)

    def _early(self, error: Exception) -> InputError | RunFailed:
        """An error of the sweeper's or the launcher's as one line; a job's own is in its row."""
        what = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        text = " ".join(f"{type(error).__name__}: {what}".split())
        if self._taken.begun:
            return RunFailed(f"the sweep has ended early ({text})")
        return InputError(f"the sweeper or launcher cannot run this sweep ({text})")


def _job(cfg: DictConfig) -> tuple[Path, dict[str, Any], dict[str, str], list[str]]:
    """A Hydra job's folder, config, choices and override lines."""
    hydra_cfg = HydraConfig.get()
    choices = {k: str(v) for k, v in hydra_cfg.runtime.choices.items() if "/" not in k and "@" not in k}
    config = plain(cfg)
    take_allowed(config)
    return Path(hydra_cfg.runtime.output_dir), config, choices, list(hydra_cfg.overrides.task)


def _told(config: dict[str, Any], folder: Path, choices: dict[str, str], lines: list[str]) -> dict[str, Any]:
    """`run` for a command: a signal ends the process with its code."""
    summary = run(config, folder, choices, lines)
    if summary["status"] == "interrupted":
        from knep.engine.loops.interrupts import exit_code  # brings Lightning, which `--cfg` does without

        by_slurm = summary["signal"] in (signal.SIGTERM, signal.SIGUSR1)
        if config["slurm"]["requeue"] and by_slurm and not summary.get("worker"):
            requeue()
        raise SystemExit(exit_code(summary["signal"]))
    return summary

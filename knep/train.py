"""The command behind `python train.py`: compose, check, seed, build, fit, test."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knep.cli_errors import one_line
from knep.errors import InputError


def main(argv: list[str] | None = None) -> None:
    """Runs `train.py` with these arguments (default: the command line); exits with 1 (failed), 2 (bad input) or 130."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(arguments):
        from knep.listing import help_text

        print(help_text())
        return
    with one_line():
        _start(arguments)


def _start(arguments: list[str]) -> None:
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException

    from knep.compose import compose_config
    from knep.elastic import agreed
    from knep.jobs import Single, Sweep, earlier_lines
    from knep.options import refuse_options
    from knep.resume import expand_ckpt
    from knep.safe import allow_typed
    from knep.typed import path_typed, readable

    refuse_options(get_args_parser(), arguments)
    arguments = readable(arguments, multirun=get_args_parser().parse_args(arguments).multirun)
    typed, arguments = arguments, expand_ckpt(arguments)
    allow_typed(get_args_parser().parse_args(typed).overrides)
    box = path_typed(typed, "replay")
    if box is not None:
        from knep.guard import replay

        replay.main(Path(box), typed)
        return
    args = get_args_parser().parse_args(arguments)
    work: Single | Sweep = Single()
    if not (args.cfg or args.info or args.shell_completion or args.hydra_help):
        jobs, configs = _check_all(args.overrides, args.multirun, args.config_dir)
        if args.multirun:
            work = Sweep(jobs)
        else:
            arguments = agreed([*arguments, *earlier_lines(configs[0], arguments)])
    elif _may_hold_unread(args):
        compose_config(args.overrides, _search(args.config_dir))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `main`, which prints their one line
    sys.argv = [sys.argv[0], *arguments]

    began = False

    def job(cfg: Any) -> float:  # defined here, since Hydra names the log by the module of what it calls
        nonlocal began
        began = True
        return work.job(cfg)

    try:
        hydra.main(config_path="pkg://knep.conf", config_name="train", version_base="1.3")(job)()
    except HydraException as error:
        compose_config(args.overrides, _search(args.config_dir))  # which knows what to write instead
        raise InputError(" ".join(str(error).split("\n")[0].split())) from error
    except (OSError, ValueError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # of Hydra's log, which is a ValueError
        unwritten = isinstance(cause, (NotADirectoryError, PermissionError, FileExistsError))
        if not isinstance(cause, OSError) or (began and not unwritten):
            raise
        raise InputError(f"{cause.filename} cannot be written ({cause.strerror}): choose another folder") from error
    finally:
        work.end()


def _search(config_dir: str | None) -> list[str]:
    return [f"file://{Path(config_dir).resolve()}"] if config_dir else []


def _may_hold_unread(args: Any) -> bool:
    """Whether a config that is only shown may have keys which knep's own files have not: composing twice takes time."""
    added = any(line.startswith("+") or "_target_=" in line or "searchpath" in line for line in args.overrides)
    return bool(args.cfg) and (added or bool(args.config_dir))


def _check_all(
    overrides: list[str], multirun: bool, config_dir: str | None
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Every job of a sweep is composed and checked before the first one starts: their override lines and configs."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from knep.compose import compose_config, parse
    from knep.rehearse import rehearse
    from knep.resume import resumes
    from knep.safe import take_allowed

    jobs = [overrides]
    if multirun:
        parsed = parse(overrides)
        batches = BasicSweeper.split_arguments([o for o in parsed if not o.key_or_group.startswith("hydra.")], None)
        jobs = [list(job) for batch in batches for job in batch]
    search = _search(config_dir)
    configs = []
    for job in jobs:
        config = compose_config(job, search).config
        take_allowed(config)
        rehearse(config)
        resumes(config, multirun)
        configs.append(config)
    return jobs, configs


def hush() -> None:
    """Leaves out what Lightning says to its own developers, and its hints about the hardware."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # so it does where a run goes on
    warnings.filterwarnings("ignore", message="The dirpath has changed.*")
    warnings.filterwarnings("ignore", message=".*The number of training batches.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # the sums of all processes are added before


def run(
    config: Mapping[str, Any], folder: Path, choices: Mapping[str, str], overrides: list[str], figures: bool = True
) -> dict[str, Any]:
    """Trains and tests what `config` says in `folder`; returns the summary that is written there.

    choices: group -> option; figures: of the test split, for TensorBoard, half a second.
    Raises InputError for input that cannot work, RunFailed for a run that could not go on.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from knep import report
    from knep.events import writers_quiet
    from knep.files import failures_told
    from knep.lock import held
    from knep.signals import Interrupted, heard

    if getattr(rank_zero_only, "rank", 0) != 0:
        return _fit(config, folder, choices, overrides, figures)
    began = time.perf_counter()
    with held(folder), failures_told(folder, report.identity(config)), writers_quiet():
        try:
            with heard():
                return _fit(config, folder, choices, overrides, figures)
        except Interrupted as asked:
            return report.interrupted(folder, config, asked.number, began)


def _fit(
    config: Mapping[str, Any], folder: Path, choices: Mapping[str, str], overrides: list[str], figures: bool
) -> dict[str, Any]:
    """`run` in each process: only the first writes and tests."""
    import lightning as L
    from lightning.pytorch.utilities import rank_zero_only

    from knep import report
    from knep.files import write_identity, write_summary
    from knep.fit import about, threads
    from knep.member import check_resume, fit_member
    from knep.recipe import Recipe, named
    from knep.safe import instantiate

    began = time.perf_counter()
    leader = getattr(rank_zero_only, "rank", 0) == 0
    hush()
    L.seed_everything(config["seed"], verbose=False)
    with threads(config["threads"]):
        recipe = Recipe.from_config(config)
        with named("data"):
            data = instantiate(config["data"])
            data.prepare()
        places = [folder / f"member_{i}" for i in range(recipe.members)] if recipe.members > 1 else [folder]
        for place in places:
            check_resume(config, place)
        if leader:
            write_identity(folder, config, overrides)
            write_summary(folder, {"status": "running", **report.identity(config)})
            report.before(config, choices, data)
        if config["trainer"].get("members", 1) > 1:
            from knep.members.run import seeds

            return seeds(folder, config, data, began)
        members = _at_once(config, data, places) or []
        for i, place in enumerate(places[len(members) :]):
            members.append(fit_member(about(config, data), data, place, config["seed"] + i))
            number = members[-1].interrupted
            if number and not leader:
                return {"status": "interrupted", "signal": number, "worker": True}
            if number:
                return report.interrupted(folder, config, number, began, members)
        if not leader:
            return {"status": "worker", "val/loss": 0}
        return report.after(folder, config, choices, data, members, began, figures)


def _at_once(config: Mapping[str, Any], data: Any, places: list[Path]) -> list[Any] | None:
    """The members of an ensemble, fitted in one pass; None where they are to be fitted one after another."""
    if len(places) < 2:
        return None
    from knep.members.run import ensemble

    return ensemble(config, data, places)


if __name__ == "__main__":
    main()

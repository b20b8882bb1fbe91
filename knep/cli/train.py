"""The command behind `python train.py`: compose, check, seed, build, fit, test."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # one of several processes, started by this file's path: what lies beside it is knep's own
    sys.path[:] = [path for path in sys.path if path != __file__.rpartition("/")[0]]

import logging
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knep.cli.errors import one_line
from knep.errors import InputError, is_full
from knep.utils.orphans import ends_with_launcher

if TYPE_CHECKING:
    from knep.config.compose import Composed

# What keeps Hydra from making a run's folder and the log in it.
_IN_THE_WAY = (NotADirectoryError, PermissionError, FileExistsError, FileNotFoundError)


def main(argv: list[str] | None = None) -> None:
    """Runs `train.py` with these arguments (default: the command line); exits with 1 (failed), 2 (bad input) or 130."""
    arguments = sys.argv[1:] if argv is None else argv
    with one_line():
        if {"--help", "-h"} & set(arguments):
            from knep.config.catalog import help_text

            print(help_text())
            return
        ends_with_launcher()
        _start(arguments)


def _start(arguments: list[str]) -> None:
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    from knep.config.command_line.aliases import path_typed, readable, tell
    from knep.config.command_line.options import refuse_options
    from knep.config.compose import compose_config
    from knep.config.instantiate import allow_typed
    from knep.distributed.torchrun import agreed
    from knep.io.run_folder import discard, standing
    from knep.io.untrusted_folder import check_written
    from knep.run.jobs import Single, Sweep, run_lines
    from knep.run.log import logging_restored
    from knep.run.resume import expand_ckpt, run_folders

    refuse_options(get_args_parser(), arguments)
    arguments = readable(arguments, multirun=get_args_parser().parse_intermixed_args(arguments).multirun)
    typed, arguments = arguments, expand_ckpt(arguments)
    allow_typed(_parsed(typed)[0].overrides)
    box = path_typed(typed, "replay")
    if box is not None:
        from knep.run import replay

        replay.main(Path(box), typed)
        return
    args, options = _parsed(arguments)
    work, overrides, stands = Single(), args.overrides, Path()
    if not (args.cfg or args.info or args.shell_completion or args.hydra_help):
        search = _search(args.config_dir)
        if args.multirun or "hydra.mode=MULTIRUN" in overrides:
            work, overrides, stands = Sweep.planned(overrides, _parsed(typed)[0].overrides, options, search)
        else:
            made = check(args.overrides, search)
            stands = standing(Path(made.folder))
            overrides = agreed(args.overrides, lambda: run_lines(made, args.overrides))
            for folder in run_folders(overrides):
                check_written(folder)
    elif _may_hold_unread(args):
        compose_config(args.overrides, _search(args.config_dir))
    tell()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `main`, which prints their one line

    began = False

    def job(cfg: Any) -> float:
        # Defined here, since Hydra names the log by the module of what it calls.
        nonlocal began
        began = True
        try:
            return work.job(cfg)
        finally:
            discard(Path(HydraConfig.get().runtime.output_dir), stands)

    before = sys.argv
    # Options last: argparse takes overrides that stand together.
    sys.argv = [before[0], *overrides, *options]
    try:
        with work.told(), logging_restored():
            hydra.main(config_path="pkg://knep.conf", config_name="train", version_base="1.3")(job)()
    except HydraException as error:
        compose_config(args.overrides, _search(args.config_dir))  # which knows what to write instead
        raise InputError(" ".join(str(error).split("\n")[0].split())) from error
    except (OSError, ValueError) as error:
        hidden = "configure handler" in str(error)  # logging hides what it met
        cause = error.__cause__ or error.__context__ if hidden else error
        if is_full(cause):
            raise cause from error.__context__
        if not isinstance(cause, OSError) or (began and not isinstance(cause, _IN_THE_WAY)):
            raise
        raise InputError(f"{cause.filename} cannot be written ({cause.strerror}): choose another folder") from error
    finally:
        sys.argv = before


def _search(config_dir: str | None) -> list[str]:
    return [f"file://{Path(config_dir).resolve()}"] if config_dir else []


def _may_hold_unread(args: Any) -> bool:
    """Whether a config that is only shown may have keys which knep's own files have not: composing twice takes time."""
    added = any(line.startswith("+") or "_target_=" in line or "searchpath" in line for line in args.overrides)
    return bool(args.cfg) and (added or bool(args.config_dir))


def _parsed(arguments: list[str]) -> tuple[Any, list[str]]:
    """What Hydra's parser finds, with overrides before, behind and between the options; and the options alone."""
    from hydra._internal.utils import get_args_parser

    args = get_args_parser().parse_intermixed_args(arguments)
    options = list(arguments)
    for override in args.overrides:
        options.remove(override)
    return args, options


def check(overrides: list[str], search: list[str], sweep: bool = False) -> Composed:
    """Composes one run and tries its tricks, before it starts. Raises InputError for whatever cannot work."""
    from knep.config.command_line.hints import with_doubt
    from knep.config.compose import compose_config
    from knep.config.instantiate import take_allowed
    from knep.engine.sanity_check import rehearse
    from knep.run.resume import check_ckpt, resumes

    def tried(lines: list[str]) -> Composed:
        made = compose_config(lines, search)
        take_allowed(made.config)
        rehearse(made.config)
        return made

    try:
        made = tried(overrides)
    except InputError as error:
        raise InputError(with_doubt(str(error), overrides, tried)) from error
    check_ckpt(made.config)
    resumes(made.config, sweep)
    return made


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

    from knep.engine.loops.interrupts import Interrupted, heard
    from knep.io.events import writers_quiet
    from knep.io.lock import held
    from knep.io.run_folder import clear_halves, failures_told
    from knep.io.untrusted_folder import check_written
    from knep.run import report
    from knep.run.log import logged

    if getattr(rank_zero_only, "rank", 0) != 0:
        return _fit(config, folder, choices, overrides, figures)
    check_written(folder)
    began = time.perf_counter()
    with held(folder), logged(folder, overrides), failures_told(folder, report.identity(config)), writers_quiet():
        try:
            with heard():
                summary = _fit(config, folder, choices, overrides, figures)
                clear_halves(folder)
                return summary
        except Interrupted as asked:
            return report.interrupted(folder, config, asked.number, began)


def _fit(
    config: Mapping[str, Any], folder: Path, choices: Mapping[str, str], overrides: list[str], figures: bool
) -> dict[str, Any]:
    """`run` in each process: only the first writes and tests."""
    import lightning as L
    from lightning.pytorch.utilities import rank_zero_only

    from knep.config.instantiate import instantiate
    from knep.data.locate import only_reads
    from knep.engine.build import about, threads
    from knep.engine.fit import check_resume, fit_member, stored_facts
    from knep.io.run_folder import write_identity, write_summary
    from knep.recipes.recipe import Recipe, named
    from knep.run import report
    from knep.utils.text import shown

    began = time.perf_counter()
    leader = getattr(rank_zero_only, "rank", 0) == 0
    hush()
    L.seed_everything(config["seed"], verbose=False)
    with threads(config["threads"]):
        recipe = Recipe.from_config(config)
        with named("data"):
            data = instantiate(config["data"])
            if config["ckpt"] is not None:
                if hasattr(data, "keep"):
                    data.keep(stored_facts(config, folder))
                if hasattr(data, "_download"):  # where its data lie, the file of a run says
                    only_reads(data)
            data.prepare()
        seeds = config["trainer"].get("members", 1)
        count = max(recipe.members, seeds)
        places = [folder / f"member_{i}" for i in range(count)] if count > 1 else [folder]
        for i, place in enumerate(places):
            check_resume({**config, "seed": config["seed"] + i} if seeds > 1 else config, place)
        if leader:
            if config["ckpt"] is None and (folder / "summary.json").is_file():
                print(f"knep: {shown(str(folder))} held a run, which this one replaces")
            write_identity(folder, config, overrides)
            write_summary(folder, {"status": "running", **report.identity(config)})
        header = report.before(choices, data)
        if seeds > 1:
            from knep.run.seeds import each_seed

            return each_seed(folder, config, data, began, header)
        members = _at_once(config, data, places, header) or []
        for i, place in enumerate(places[len(members) :]):
            members.append(fit_member(about(config, data), data, place, config["seed"] + i, header=header))
            header = []
            number = members[-1].interrupted
            if number and not leader:
                return {"status": "interrupted", "signal": number, "worker": True}
            if number:
                return report.interrupted(folder, config, number, began, members)
        if not leader:
            return {"status": "worker", "val/loss": 0}
        return report.after(folder, config, choices, overrides, data, members, began, figures)


def _at_once(config: Mapping[str, Any], data: Any, places: list[Path], header: list[str]) -> list[Any] | None:
    """The members of an ensemble, fitted in one pass; None where they are to be fitted one after another."""
    if len(places) < 2:
        return None
    from knep.run.seeds import ensemble

    return ensemble(config, data, places, header)


if __name__ == "__main__":
    main()

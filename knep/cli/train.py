"""The command behind `python train.py`: compose, check, seed, build, fit, test."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # one of several processes, started by this file's path: what lies beside it is knep's own
    sys.path[:] = [path for path in sys.path if path != __file__.rpartition("/")[0]]

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knep.cli.errors import one_line
from knep.errors import InputError, is_full
from knep.run.run import check
from knep.utils.orphans import ends_with_launcher

if TYPE_CHECKING:
    from omegaconf import DictConfig

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
    if "recipe=auto" in _parsed(arguments)[0].overrides:
        _auto(_parsed(arguments)[0])
        return
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
        args.overrides = overrides = _rated(args, overrides, search)
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

    def job(cfg: DictConfig) -> float:
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
        with _in_one_line(args, lambda: began), work.told(), logging_restored(), _mode_of_flags(args):
            hydra.main(config_path="pkg://knep.conf", config_name="train", version_base="1.3")(job)()
    finally:
        sys.argv = before


@contextlib.contextmanager
def _in_one_line(args: argparse.Namespace, began: Callable[[], bool]) -> Iterator[None]:
    """What Hydra refuses, and files that cannot be written, as InputError. began: whether a job was."""
    from hydra.errors import HydraException

    from knep.config.compose import compose_config

    try:
        yield
    except HydraException as error:
        compose_config(args.overrides, _search(args.config_dir))  # which knows what to write instead
        raise InputError(" ".join(str(error).split("\n")[0].split())) from error
    except (OSError, ValueError) as error:
        hidden = "configure handler" in str(error)  # logging hides what it met
        cause = error.__cause__ or error.__context__ if hidden else error
        if is_full(cause):
            raise cause from error.__context__
        if not isinstance(cause, OSError) or (began() and not isinstance(cause, _IN_THE_WAY)):
            raise
        raise InputError(f"{cause.filename} cannot be written ({cause.strerror}): choose another folder") from error


@contextlib.contextmanager
def _mode_of_flags(args: argparse.Namespace) -> Iterator[None]:
    """Hydra composes a whole config to read `hydra.mode`, 0.15 s, which no file of knep's sets: the flag -m decides."""
    from hydra._internal.hydra import Hydra

    read, folders = Hydra.get_mode, ("hydra.run.dir=", "hydra.sweep.dir=")
    typed = [line for line in args.overrides if line.lstrip("+~").startswith("hydra")]
    others = args.config_dir or args.config_path or args.config_name
    if not others and all(line.startswith(folders) for line in typed):
        Hydra.get_mode = lambda *_, **__: None
    try:
        yield
    finally:
        Hydra.get_mode = read


def _auto(args: argparse.Namespace) -> None:
    """A recipe that short paired trials find, in the place of one run."""
    swept = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if swept or args.cfg or args.info or args.config_dir or "WORLD_SIZE" in os.environ:
        raise InputError(
            "recipe=auto looks for a recipe in runs of its own, by one process, among knep's options: leave out -m, "
            "--cfg, --info, --config-dir and torchrun"
        )
    from knep.evidence.auto.command import auto

    auto(args.overrides)


def _rated(args: argparse.Namespace, overrides: list[str], search: list[str]) -> list[str]:
    """The overrides with a rate in the place of `optimizer.lr=auto`, which short trials find before the run."""
    if not any(line.startswith("optimizer.lr=") and "auto" in line for line in overrides):
        return overrides
    if args.multirun or "optimizer.lr=auto" not in overrides or "WORLD_SIZE" in os.environ:
        raise InputError(
            "optimizer.lr=auto looks for the rate of one run in one process: try knep lr with the lines of each, then "
            "write what it finds"
        )
    from knep.evidence.rate.command import resolved

    return resolved(overrides, search)


def _search(config_dir: str | None) -> list[str]:
    return [f"file://{Path(config_dir).resolve()}"] if config_dir else []


def _may_hold_unread(args: argparse.Namespace) -> bool:
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


if __name__ == "__main__":
    main()

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
    """Runs `train.py` with these arguments (default: the command line); exits with 2 on bad input, 130 on Ctrl-C."""
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

    from knep.resume import expand_ckpt
    from knep.safe import allow_typed

    typed, arguments = arguments, expand_ckpt(arguments)
    allow_typed(get_args_parser().parse_args(typed).overrides)
    args = get_args_parser().parse_args(arguments)
    if not (args.cfg or args.info or args.shell_completion or args.hydra_help):
        _check_all(args.overrides, args.multirun, args.config_dir)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `main`, which prints their one line
    sys.argv = [sys.argv[0], *arguments]
    refused: list[InputError] = []

    def job(cfg: Any) -> float:
        # Hydra prints a paragraph for an exception that leaves a job: it is kept, and raised when all jobs are done.
        try:
            return _job(cfg)
        except InputError as error:
            refused.append(error)
            return float("inf")

    try:
        hydra.main(config_path="pkg://knep.conf", config_name="train", version_base="1.3")(job)()
    except HydraException as error:
        raise InputError(" ".join(str(error).split("\n")[0].split())) from error
    except (NotADirectoryError, PermissionError, FileExistsError) as error:
        raise InputError(f"{error.filename} cannot be written ({error.strerror}): choose another folder") from error
    if refused:
        raise refused[0]


def _check_all(overrides: list[str], multirun: bool, config_dir: str | None) -> None:
    """Every job of a sweep is composed and checked before the first one starts."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from knep.compose import compose_config, parse
    from knep.rehearse import rehearse
    from knep.safe import take_allowed

    jobs = [overrides]
    if multirun:
        parsed = parse(overrides)
        batches = BasicSweeper.split_arguments([o for o in parsed if not o.key_or_group.startswith("hydra.")], None)
        jobs = [list(job) for batch in batches for job in batch]
    search = [f"file://{Path(config_dir).resolve()}"] if config_dir else []
    for job in jobs:
        config = compose_config(job, search).config
        take_allowed(config)
        rehearse(config)


def _job(cfg: Any) -> float:
    """One Hydra job; what it returns is what sweepers optimise: the best validation loss."""
    from hydra.core.hydra_config import HydraConfig

    from knep.compose import plain
    from knep.files import discard
    from knep.safe import take_allowed

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    choices = {k: str(v) for k, v in hydra_cfg.runtime.choices.items() if "/" not in k and "@" not in k}
    config = plain(cfg)
    take_allowed(config)
    try:
        summary = run(config, folder, choices, list(hydra_cfg.overrides.task))
    except InputError:
        discard(folder)
        raise
    if summary["status"] == "interrupted":
        raise SystemExit(128 + summary["signal"])
    return float(summary["val/loss"])


def hush() -> None:
    """Leaves out what Lightning says to its own developers, and its hints about the hardware."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # so it does where a run goes on
    warnings.filterwarnings("ignore", message="The dirpath has changed.*")
    warnings.filterwarnings("ignore", message=".*The number of training batches.*")


def run(config: Mapping[str, Any], folder: Path, choices: Mapping[str, str], overrides: list[str]) -> dict[str, Any]:
    """Trains and tests what `config` says in `folder`; returns the summary that is written there.

    choices: group -> option. Raises InputError for input that cannot work.
    """
    import lightning as L
    from lightning.pytorch.utilities import rank_zero_only

    from knep import report
    from knep.files import write_identity
    from knep.fit import about, threads
    from knep.member import fit_member
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
        if leader:
            write_identity(folder, config, overrides)
            report.before(config, choices, data, folder)
        members = []
        for i in range(recipe.members):
            place = folder / f"member_{i}" if recipe.members > 1 else folder
            members.append(fit_member(about(config, data), data, place, config["seed"] + i))
            if members[-1].interrupted:
                return report.interrupted(folder, config, members, began)
        return (
            report.after(folder, config, choices, data, members, began)
            if leader
            else {"status": "worker", "val/loss": 0}
        )


if __name__ == "__main__":
    main()

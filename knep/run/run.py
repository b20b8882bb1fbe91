"""One run in its folder: fit, test, report."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knep.errors import InputError

if TYPE_CHECKING:
    from knep.config.compose import Composed
    from knep.config.schema import RunConfig
    from knep.data.base import ImageData


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
        rehearse(made.run)
        return made

    try:
        made = tried(overrides)
    except InputError as error:
        raise InputError(with_doubt(str(error), overrides, tried)) from error
    check_ckpt(made.run)
    resumes(made.run.resume, sweep)
    return made


def hush() -> None:
    """Leaves out what Lightning says to its own developers, and its hints about the hardware."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # of torch's, to Lightning's own code
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # batches lie in memory, or have theirs
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # so it does where a run goes on
    warnings.filterwarnings("ignore", message="The dirpath has changed.*")  # of a run that was moved, which may be
    warnings.filterwarnings("ignore", message=".*The number of training batches.*")  # fewer than log_every: as typed
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # the sums of all processes are added before


def run(
    config: Mapping[str, Any], folder: Path, choices: Mapping[str, str], overrides: list[str], figures: bool = True
) -> dict[str, Any]:
    """Trains and tests what `config` says in `folder`; returns the summary that is written there.

    choices: group -> option; figures: of the test split, for TensorBoard, half a second.
    Raises InputError for input that cannot work, RunFailed for a run that could not go on.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from knep.engine.loops.interrupts import heard
    from knep.errors import Interrupted
    from knep.io.lock import held
    from knep.io.run_folder import clear_halves, failures_told, writers_quiet
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
    from knep.config.schema import RunConfig
    from knep.engine.build import threads
    from knep.engine.fit import check_resume, fit_member, stored_facts
    from knep.errors import named
    from knep.io.run_folder import write_identity, write_summary
    from knep.recipes.recipe import Recipe
    from knep.run import report
    from knep.utils.text import shown

    began = time.perf_counter()
    whole = RunConfig.of(config)
    leader = getattr(rank_zero_only, "rank", 0) == 0
    hush()
    L.seed_everything(whole.seed, verbose=False)
    with threads(whole.runtime.threads):
        recipe = Recipe.from_config(config)
        with named("data"):
            data = instantiate(whole.data)
            if whole.resume.ckpt is not None:
                if hasattr(data, "keep"):
                    data.keep(stored_facts(whole, folder))
                data.only_reads = True  # where its data lie, the file of a run says
            data.prepare()
        seeds = whole.trainer.members
        count = max(recipe.members, seeds)
        places = [folder / f"member_{i}" for i in range(count)] if count > 1 else [folder]
        for i, place in enumerate(places):
            check_resume(whole.seeded(whole.seed + i) if seeds > 1 else whole, place)
        if leader:
            if config["ckpt"] is None and (folder / "summary.json").is_file():
                print(f"knep: {shown(str(folder))} held a run, which this one replaces")
            write_identity(folder, config, overrides)
            write_summary(folder, {"status": "running", **report.identity(config)})
        header = report.before(choices, data)
        if seeds > 1:
            from knep.run.seeds import each_seed

            return each_seed(folder, whole, data, began, header)
        members = _at_once(whole, data, places, header) or []
        for i, place in enumerate(places[len(members) :]):
            members.append(fit_member(whole, data, place, whole.seed + i, header=header))
            header = []
            number = members[-1].interrupted
            if number and not leader:
                return {"status": "interrupted", "signal": number, "worker": True}
            if number:
                return report.interrupted(folder, config, number, began, members)
        if not leader:
            return {"status": "worker", "val/loss": 0}
        return report.after(folder, config, choices, overrides, data, members, began, figures)


def _at_once(whole: RunConfig, data: ImageData, places: list[Path], header: list[str]) -> list[Any] | None:
    """The members of an ensemble, fitted in one pass; None where they are to be fitted one after another."""
    if len(places) < 2:
        return None
    from knep.run.seeds import ensemble

    return ensemble(whole, data, places, header)

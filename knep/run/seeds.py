"""Members in a run folder: the seeds of `trainer.members`, and an ensemble whose members are trained in one pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knep.config.schema import RunConfig
from knep.data.base import ImageData
from knep.engine.evaluate import batches_of, evaluate
from knep.engine.fit import Member as Single
from knep.engine.fit import fit_member
from knep.engine.logging.csv_logger import CsvLogger
from knep.ensemble import record
from knep.ensemble.loop import fit
from knep.ensemble.member import Member
from knep.ensemble.support import folds, members_of, supports
from knep.errors import Interrupted, RunFailed
from knep.io import checkpoint
from knep.io.find_checkpoint import saved_of
from knep.io.run_folder import begin_reading, reads, write_summary
from knep.run import report
from knep.utils.text import shown


def ensemble(run: RunConfig, data: ImageData, places: Sequence[Path], header: Sequence[str]) -> list[Single] | None:
    """The fitted members of an ensemble, saved in their places; None where a fit for each serves better.

    header: lines to print before the first step, where it trains them.
    That is for one member, for what `supports` refuses, and where one pass for all is no faster, since single fits can
    be resumed. Raises RunFailed where a member's loss was no number.
    """
    run = _afresh(run, places)
    if len(places) < 2 or supports(run):
        return None
    trial = Member(run, data)
    if not folds([run], trial.module.model, trial.module.device):
        return None
    began = time.perf_counter()
    said = [*header, f"trains {len(places)} members in one pass"]
    members = fit(members_of(run, len(places)), data, header=said)
    images = sum(m.steps for m in members) * data.batch_size
    rate = images / len(places) / (time.perf_counter() - began)
    for member, place in zip(members, places, strict=True):
        if member.ended == "failed":
            raise RunFailed(
                f"{place}: the loss of seed {member.run.seed} is no number after step {member.steps}: lower "
                "optimizer.lr"
            )
        _save(member, place)
    return [
        Single(m.module, place, None, m.epochs, m.steps, m.best, rate, m.ended == "stopped_early")
        for m, place in zip(members, places, strict=True)
    ]


def each_seed(folder: Path, run: RunConfig, data: ImageData, began: float, header: Sequence[str]) -> dict[str, Any]:
    """Trains and tests `trainer.members` seeds, each in a folder of its own; returns the summary of all.

    header: lines to print before the first step.
    At once where `supports` gives no reason against it, which is printed otherwise, and one after another then.
    """
    places = [folder / f"member_{i}" for i in range(run.trainer.members)]
    run = _afresh(run, places)
    runs = members_of(run, len(places))
    reason = supports(run)
    if reason:
        said = [*header, f"trains {len(runs)} members one after another: {reason}"]
        begin_reading(folder)
        records = [
            _alone(one, data, place, said if one is runs[0] else ()) for one, place in zip(runs, places, strict=True)
        ]
    else:
        members = fit(runs, data, header=header)
        for member, place in zip(members, places, strict=True):
            _save(member, place)
        begin_reading(folder)
        records = [
            _told(record(member, data), member.run, place) for member, place in zip(members, places, strict=True)
        ]
    return _summary(folder, run, records, began)


def _afresh(run: RunConfig, places: Sequence[Path]) -> RunConfig:
    """Without `ckpt` where no member has saved anything: what is trained in one pass starts anew."""
    ckpt = run.resume.ckpt
    if ckpt is None or any(saved_of(ckpt, run.members > 1, place) for place in places):
        return run
    print(f"knep: no member in {ckpt} has saved a state to go on from: they start anew")
    return RunConfig.of({**run.plain, "ckpt": None})


def _told(found: dict[str, Any], run: RunConfig, place: Path) -> dict[str, Any]:
    """The record of a member, which is its summary too; `sealed` counts what earlier lives of the run have read."""
    found = {**found, "sealed": found.get("sealed", 0) + reads(place)}
    write_summary(place, {k: v for k, v in found.items() if k != "curve"} | report.identity(run.plain))
    return found


def _save(member: Member, place: Path) -> None:
    """The weights and the curve of a settled member, where a single run leaves them."""
    place.mkdir(exist_ok=True)
    (place / "checkpoints").mkdir(exist_ok=True)
    state = {"state_dict": member.module.state_dict(), "knep": member.module.about}
    checkpoint.write(state, place / "checkpoints" / "final.ckpt")
    table = CsvLogger(place)
    for row in member.curve:
        table.log_metrics({k: v for k, v in row.items() if k != "step"}, int(row["step"]))
    table.save()


def _alone(run: RunConfig, data: ImageData, place: Path, header: Sequence[str]) -> dict[str, Any]:
    try:
        fitted = fit_member(run, data, place, run.seed, header=header)
    except RunFailed as failure:
        found = {"findings": list(failure.findings)} if run.doctor is not None else {}
        return _told({"seed": run.seed, "status": "failed", "reason": str(failure), **found}, run, place)
    if fitted.interrupted:
        raise Interrupted(fitted.interrupted)
    found: dict[str, Any] = {"findings": list(fitted.findings)} if run.doctor is not None else {}
    if fitted.stopped_by:
        found["stopped_by"] = fitted.stopped_by
    for split in ("val", "test"):
        batches = batches_of(run.trainer, data, split)
        measured = evaluate([fitted.module], batches, data.num_classes, keep=0, mirrored=run.runtime.test_flip)
        found |= {f"{split}/acc": measured.acc, f"{split}/loss": measured.loss}
    ended = {"status": "stopped_early" if fitted.stopped_early or fitted.stopped_by else "finished"}
    counts = {"sealed": 1, "epochs": fitted.epochs, "steps": fitted.steps}
    return _told({"seed": run.seed, **ended, **found, **counts}, run, place)


def _summary(folder: Path, run: RunConfig, records: Sequence[Mapping[str, Any]], began: float) -> dict[str, Any]:
    """Written and returned: means over the members that finished, and what each reached."""
    whole = [r for r in records if r["status"] != "failed"]
    if not whole:
        raise RunFailed(f"{folder}: the loss of every member was no number: lower optimizer.lr")
    keys = ("test/acc", "test/loss", "val/acc", "val/loss")
    accuracies = [r["test/acc"] for r in whole]
    summary: dict[str, Any] = {
        "status": "finished",
        **{key: statistics.fmean(r[key] for r in whole) for key in keys},
        "sealed": reads(folder),
        "members": len(records),
        "members/failed": [r["seed"] for r in records if r["status"] == "failed"],
        "members/test_acc": accuracies,
        "members/test_acc_mean": statistics.fmean(accuracies),
        "members/test_acc_std": statistics.stdev(accuracies) if len(whole) > 1 else 0.0,
        "seconds": round(time.perf_counter() - began, 2),
        **report.identity(run.plain),
    }
    if run.doctor is not None:
        summary["findings"] = [row for r in records for row in r["findings"]]
    write_summary(folder, summary)
    mean, std = summary["members/test_acc_mean"], summary["members/test_acc_std"]
    finished = f"{len(whole)} of {len(records)} members"
    print(f"test accuracy {mean:.2%}, standard deviation {std:.2%} over {finished}: {shown(folder)}")
    return summary

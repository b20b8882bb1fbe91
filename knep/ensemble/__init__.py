"""Many members at once: seeds, or settings that change no shapes, trained in one process as one fit.

A member equals the single run of its config: the same initial weights, order of batches, draws and schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from knep.config.instantiate import instantiate
from knep.config.schema import RunConfig
from knep.data.base import ImageData
from knep.engine.build import threads
from knep.engine.evaluate import batches_of, evaluate
from knep.ensemble.loop import fit
from knep.ensemble.member import Member
from knep.ensemble.support import check_alike, members_of, supports
from knep.errors import InputError, named

__all__ = ["members_of", "supports", "train"]


def train(runs: Sequence[RunConfig], *, together: bool | None = None) -> list[dict[str, Any]]:
    """Trains and tests one member per run, and returns a record of each; nothing is written.

    runs: composed, alike but for `knep.ensemble.support.FREE`; `members_of(run, 8)` makes those of 8 seeds.
    together: True takes one pass for all where the models allow it, False a pass for each; None what is faster.

    A record holds seed, status ("finished", "stopped_early" or "failed", where a loss was no number), test/acc,
    test/loss (NaN for a failed member), val/acc, val/loss of the weights that are tested, val/acc_best, best_epoch
    (from 1), epochs, steps, cpu_seconds (processor time of all, shared equally), and curve, a row for each validation:
    {"step", "epoch", "train/loss", "train/acc", "val/loss", "val/acc"}. The test split is read once for each member.
    Raises InputError where `supports` gives a reason, and for runs that differ in more.
    """
    check_alike(runs)
    reason = supports(runs[0])
    if reason:
        raise InputError(f"members: {reason}: train each config by a run of its own")
    began = time.process_time()
    with threads(runs[0].runtime.threads):
        with named("data"):
            data = instantiate(runs[0].data)
            data.prepare()
        records = [record(member, data) for member in fit(runs, data, together)]
    seconds = round((time.process_time() - began) / len(records), 3)
    return [{**r, "cpu_seconds": seconds} for r in records]


def record(member: Member, data: ImageData) -> dict[str, Any]:
    """What came out of a settled member; reads the test split where it did not fail."""
    mirrored = member.run.runtime.test_flip

    def measured(split: str) -> tuple[float, float]:
        batches = batches_of(member.run.trainer, data, split)
        found = evaluate([member.module], batches, data.num_classes, keep=0, mirrored=mirrored)
        return found.acc, found.loss

    acc = loss = val_acc = val_loss = math.nan
    if member.ended != "failed":
        val_acc, val_loss = measured("val")
        if all(p.isfinite().all() for p in member.module.model.parameters()):
            acc, loss = measured("test")
    return {
        "seed": member.run.seed,
        "status": member.ended if math.isfinite(loss) else "failed",
        "test/acc": acc,
        "test/loss": loss,
        "val/acc": val_acc,
        "val/loss": val_loss,
        "val/acc_best": member.best.get("val/acc", math.nan),
        "best_epoch": int(member.best.get("epoch", -1)) + 1,
        "sealed": int(math.isfinite(loss)),  # readings of the test split
        "epochs": member.epochs,
        "steps": member.steps,
        "curve": member.curve,
    }

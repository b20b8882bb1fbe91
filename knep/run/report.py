"""What a run says: a few lines before, a short table after, summary.json always."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knep.config.catalog import recipe_choices
from knep.config.schema import RunConfig, config_hash
from knep.data.base import KINDS, ImageData
from knep.engine.evaluate import Evaluation, batches_of, evaluate, measure
from knep.engine.fit import Member
from knep.engine.logging.tensorboard import Board
from knep.io.run_folder import begin_reading, write_summary
from knep.run.figures import show, show_task
from knep.run.source_hash import code_hash, loaded_beside
from knep.utils.bits import packed
from knep.utils.text import console, shown

# What TensorBoard shows of a whole run.
_FINAL = (
    "test/acc",
    "test/loss",
    "val/acc",
    "val/loss",
    "val/acc_best",
    "best_epoch",
    "samples_per_second",
    "seconds",
    "parameters",
    "members/test_acc_mean",
)


def before(choices: Mapping[str, str], data: ImageData) -> list[str]:
    """Lines that say what is trained on what, and what the user changed against the recipe."""
    kept = recipe_choices(choices["recipe"])
    changed = [f"{slot}={choices[slot]} (recipe: {o})" for slot, o in kept.items() if choices.get(slot) != o]
    sizes, name = data.sizes, shown(choices["data"])
    shape = (data.channels, data.image_size, data.image_size) if data.shape is None else data.shape
    kind = "images" if len(shape) == 3 else "rows"
    what = "numbers to predict" if data.target == "number" else KINDS[data.target]
    return [
        shown(f"recipe {choices['recipe']}" + (f", changed: {', '.join(changed)}" if changed else ", as it is")),
        f"data {name}: {sizes['train']:,} training, {sizes['val']:,} validation, {sizes['test']:,} test "
        f"{kind} of {' x '.join(map(str, shape))}, {data.num_classes} {what}",
    ]


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every summary says, whatever became of the run."""
    beside = loaded_beside(config)
    found = {"seed": config["seed"], "config_hash": config_hash(config), "code_hash": code_hash(config, beside)}
    return {**found, "modules": beside} if beside else found


def interrupted(
    folder: Path, config: Mapping[str, Any], number: int, began: float, members: Sequence[Member] = ()
) -> dict[str, Any]:
    """The summary of a run that a signal stopped; members: those that were fitted so far, in part or whole."""
    summary: dict[str, Any] = {
        "status": "interrupted",
        "signal": number,
        "seconds": round(time.perf_counter() - began, 2),
        **identity(config),
    }
    if members:
        summary |= {"epochs": members[-1].epochs, "steps": members[-1].steps}
        findings = [row for m in members for row in m.findings]
        summary |= {"findings": findings} if findings else {}
    write_summary(folder, summary)
    steps = f" after {members[-1].steps} steps" if members else ""
    saved = any(folder.glob("**/checkpoints/last.ckpt"))
    print(
        f"knep: interrupted{steps}; "
        + (f"go on with: python train.py ckpt={shown(folder)}" if saved else "nothing was saved")
    )
    return summary


def after(
    folder: Path,
    config: Mapping[str, Any],
    choices: Mapping[str, str],
    lines: Sequence[str],
    data: ImageData,
    members: Sequence[Member],
    began: float,
    figures: bool,
) -> dict[str, Any]:
    """Validates the final weights, reads the test split once, writes and prints what came out, and draws it where
    figures are asked for. Returns the summary, and with it which test images are right, "test/right"."""
    run = RunConfig.of(config)
    if run.task_name != "multiclass":
        return _after_task(folder, run, choices, lines, data, members[0], began, figures)
    modules, trainer = [m.module for m in members], run.trainer
    val = evaluate(modules, batches_of(trainer, data, "val"), data.num_classes, mirrored=config["test_flip"])
    sealed = begin_reading(folder)
    test = evaluate(modules, batches_of(trainer, data, "test"), data.num_classes, mirrored=config["test_flip"])
    low, high = test.interval()
    parameters = sum(p.numel() for m in modules for p in m.model.parameters())
    best, rates = members[0].best, [m.samples_per_second for m in members if m.samples_per_second]
    summary: dict[str, Any] = {
        "status": "stopped_early" if any(m.stopped_early or m.stopped_by for m in members) else "finished",
        "test/acc": test.acc,
        "test/loss": test.loss,
        "test/acc_low": low,
        "test/acc_high": high,
        "val/acc": val.acc,
        "val/loss": val.loss,
        **{f"test/{name}": value for name, value in test.metrics.items()},
        **{f"val/{name}": value for name, value in val.metrics.items()},
        "best_epoch": int(best.get("epoch", -1)) + 1,
        "epochs": members[0].epochs,
        "steps": sum(m.steps for m in members),
        "samples_per_second": round(statistics.fmean(rates), 1) if rates else None,  # nothing was left to train
        "seconds": round(time.perf_counter() - began, 2),
        "parameters": parameters,
        "classes": data.num_classes,
        "sealed": sealed,
        **identity(config),
    }
    if best:
        summary["val/acc_best"] = max(m.best["val/acc"] for m in members if m.best)
    summary |= _told(config, members)
    if members[0].calibrated is not None:
        summary |= _calibrated(members, val, test)
    if len(members) > 1:
        summary["members/test_acc"] = test.member_acc
        summary["members/test_acc_mean"] = statistics.fmean(test.member_acc)
        summary["members/test_acc_std"] = statistics.stdev(test.member_acc)
    board = members[0].logger
    if figures and isinstance(board, Board):
        numbers = {k: float(summary[k]) for k in _FINAL if summary.get(k) is not None}
        show(board, config, choices, lines, test, data.class_names, numbers, members[0].steps)
    write_summary(folder, summary)  # last of all files: a run that it calls finished has everything
    _print_table(summary, folder, test.images)
    return summary | {"test/right": packed(test.right_N.numpy())}


def _calibrated(members: Sequence[Member], val: Evaluation, test: Evaluation) -> dict[str, Any]:
    """Temperatures, and expected calibration errors with and, of the first member on validation, without them."""
    found = [m.calibrated for m in members if m.calibrated is not None]
    return {
        "temperature": [c.temperature for c in found] if len(found) > 1 else found[0].temperature,
        "val/ece_before": found[0].before,
        "val/ece": val.calibration_error,
        "test/ece": test.calibration_error,
    }


def _told(config: Mapping[str, Any], members: Sequence[Member]) -> dict[str, Any]:
    """What guard, doctor and averaging say of a training, where they have something to say."""
    found: dict[str, Any] = {}
    start = members[0].module.about.get("weights")
    if start is not None:
        found["weights"] = start
    if any(m.module.guard.interventions for m in members):
        found["guard"] = [m.module.guard.report() for m in members]
    if "doctor" in config:
        found["findings"] = [row for m in members for row in m.findings]
    if any(m.averaged for m in members):
        found["averaged"] = members[0].averaged
    stopped = next((m.stopped_by for m in members if m.stopped_by), None)
    if stopped is not None:
        found["stopped_by"] = stopped
    return found


def _after_task(
    folder: Path,
    run: RunConfig,
    choices: Mapping[str, str],
    lines: Sequence[str],
    data: ImageData,
    member: Member,
    began: float,
    figures: bool,
) -> dict[str, Any]:
    """`after` for a task other than one class of several: its own numbers, in their own units."""
    val = measure(member.module, batches_of(run.trainer, data, "val"))
    sealed = begin_reading(folder)
    test = measure(member.module, batches_of(run.trainer, data, "test"))
    monitor, _ = run.watched
    summary: dict[str, Any] = {
        "status": "stopped_early" if member.stopped_early or member.stopped_by else "finished",
        "task": run.task_name,
        **{f"test/{name}": value for name, value in test.numbers.items()},
        **{f"val/{name}": value for name, value in val.numbers.items()},
        "best_epoch": int(member.best.get("epoch", -1)) + 1,
        "epochs": member.epochs,
        "steps": member.steps,
        "samples_per_second": round(member.samples_per_second, 1) or None,
        "seconds": round(time.perf_counter() - began, 2),
        "parameters": sum(p.numel() for p in member.module.model.parameters()),
        "outputs": member.module.task.outputs,
        "sealed": sealed,
        **identity(run.plain),
        **_told(run.plain, [member]),
    }
    if monitor in member.best:
        summary[f"{monitor}_best"] = member.best[monitor]
    if figures and isinstance(member.logger, Board):
        shown_of_all = ("best_epoch", "samples_per_second", "seconds", "parameters")
        named = [k for k in summary if k.startswith(("val/", "test/")) or k in shown_of_all]
        numbers = {k: float(summary[k]) for k in named if summary[k] is not None}
        show_task(member.logger, run.plain, choices, lines, test, member, data.class_names, numbers)
    write_summary(folder, summary)  # last of all files: a run that it calls finished has everything
    measured = "  ".join(f"{name} {value:.4g}" for name, value in test.numbers.items())
    best = "none: training ended before its first validation"
    if monitor in member.best:
        best = f"{summary['best_epoch']} of {summary['epochs']} ({monitor[4:]} {member.best[monitor]:.4g})"
    _table({"best validation epoch": best, "test": f"{measured}  (n = {test.rows:,})"}, summary, folder)
    return summary


def _print_table(summary: Mapping[str, Any], folder: Path, images: int) -> None:
    best = "none: training ended before its first validation"
    if "val/acc_best" in summary:
        best = f"{summary['best_epoch']} of {summary['epochs']} (acc {summary['val/acc_best']:.2%})"
    rows = {
        "best validation epoch": best,
        "test accuracy": f"{summary['test/acc']:.2%}  (95 % interval {summary['test/acc_low']:.2%} to "
        f"{summary['test/acc_high']:.2%}, n = {images:,})",
    }
    _table(rows, summary, folder)


def _table(first: Mapping[str, str], summary: Mapping[str, Any], folder: Path) -> None:
    """first: the rows that stand before those of every run."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path is never cut
    rows = {
        **first,
        "samples/s": "" if summary["samples_per_second"] is None else f"{summary['samples_per_second']:,.0f}",
        "parameters": f"{summary['parameters']:,}",
        "run folder": shown(folder),
        "look at it": f"tensorboard --logdir {shown(folder)}",
    }
    if "temperature" in summary:
        rows["calibration error"] = f"{summary['test/ece']:.2%} on test; {_temperatures(summary)}"
    if "averaged" in summary:
        rows["averaged"] = summary["averaged"]
    if "members/test_acc" in summary:
        each = ", ".join(f"{a:.2%}" for a in summary["members/test_acc"])
        mean, std = summary["members/test_acc_mean"], summary["members/test_acc_std"]
        rows["members"] = f"{each}  (mean {mean:.2%}, std {std:.2%})"
    for name, value in ((name, value) for name, value in rows.items() if value):
        table.add_row(name, value)
    wide = None if sys.stdout.isatty() else 1000  # a file or a pipe has no edge
    console(soft_wrap=True, width=wide, force_jupyter=False).print(table)


def _temperatures(summary: Mapping[str, Any]) -> str:
    t = summary["temperature"]
    shown_t = ", ".join(f"{one:.3g}" for one in (t if isinstance(t, list) else [t]))
    return f"temperature {shown_t}, fitted on validation ({summary['val/ece_before']:.2%} before)"

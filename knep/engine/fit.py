"""Fitting one member of a run: most runs have one, an ensemble several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from knep.config.diff import Apply, Change, changes, said
from knep.config.instantiate import instantiate
from knep.config.schema import DataSpec, RunConfig
from knep.data.base import ImageData
from knep.distributed.watchdog import deaths_named
from knep.engine.build import build_module, spec_of
from knep.engine.calibration import Calibrated, calibrate, output_layer
from knep.engine.distill import teacher_of
from knep.engine.load import load_weights, read_checkpoint, read_facts, stored_module
from knep.engine.logging.csv_logger import earlier_rows
from knep.engine.logging.history import Clock, History
from knep.engine.logging.profile import StepProfile
from knep.engine.loops.lean import LeanEpoch
from knep.engine.loops.micro_batches import SameEverywhere, use_micro_batches
from knep.engine.module import Classifier
from knep.engine.precision import levers, lost_in_bf16, why_not_bf16, wrong_in_bf16
from knep.engine.stored_state import check_stored_run
from knep.engine.trainer import build_callbacks, build_trainer
from knep.errors import InputError, Interrupted, OutOfMemory
from knep.io import checkpoint
from knep.io.find_checkpoint import find_whole, saved_of
from knep.io.schema import whole
from knep.utils.hardware import compile_model, quick_checks
from knep.utils.memory import keep_freed_memory

_NO_MEMORY = "can't allocate memory"  # of torch's allocator for the CPU, which has no exception of its own
# What a checkpoint to go on from holds beside the weights.
_LOOPS = {"global_step": int, "loops": dict, "optimizer_states": list, "lr_schedulers": list, "callbacks": dict}


@dataclass
class Member:
    """A fitted model with what its fit measured; logger: its TensorBoardLogger.

    interrupted: the signal that stopped it, 2 or 15; 0 where it ended by itself; findings: of the doctor, as plain
    data; stopped_by: the disease for which it ended the run; averaged: what averaging did, None without any;
    calibrated: what was done to the scores at the end.
    """

    module: Classifier
    folder: Path
    logger: Any
    epochs: int
    steps: int
    best: Mapping[str, float]
    samples_per_second: float
    stopped_early: bool = False
    interrupted: int = 0
    findings: Sequence[Mapping[str, Any]] = ()
    stopped_by: str | None = None
    averaged: str | None = None
    calibrated: Calibrated | None = None


def fit_member(
    run: RunConfig,
    data: ImageData,
    folder: Path,
    seed: int,
    callbacks: Sequence[Callback] = (),
    header: Sequence[str] = (),
) -> Member:
    """Builds, fits and saves one model in `folder`; resumes where the run's `ckpt` has a checkpoint for it.

    callbacks: of Lightning, beside the recipe's and the run's own; header: lines to print before the first step.
    Raises InputError where the optimizer, the data and the checkpoint do not fit together.
    """
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # here, and never again: see `knep.io.checkpoint.write`
    torch.manual_seed(seed)
    spec = spec_of(run, data)
    data.sampling = instantiate(run.sampling) if run.sampling is not None else None
    earlier = _stored(run, folder, warn=False) if run.weights is not None else None
    begun = None if earlier is None else earlier[1]["knep"].get("weights")
    module = build_module(run, spec, data, seed=seed, kept=begun)
    teacher, taught = teacher_of(run, spec, data)
    module.step.guide = None if teacher is None else teacher.guide
    if run.calibrate:
        if run.task_name != "multiclass":
            raise InputError(f"calibrate=true is for probabilities of classes, and task={run.task_name} has none")
        if "fsdp" in str(run.trainer.strategy):
            raise InputError("calibrate=true changes whole weights, which FSDP has in shards: write trainer=ddp")
        output_layer(module, data.sample(8))
    wrong = wrong_in_bf16(module.model, module.scaling(data.sample(2)))
    digits = lost_in_bf16(run.task_name, spec)
    compile_model(module.model, run.runtime.compile)
    parameters = sum(p.numel() for p in module.model.parameters())
    data.seed = seed
    data.drop_last = module.recipe.accumulate != "epoch"
    parts = use_micro_batches(data, module, _device(run))
    batches = data.train_batches
    clock, history = Clock(), History()
    observers: list[Any] = [StepProfile(folder)] if run.runtime.profile else []
    doctor = instantiate(run.doctor) if run.doctor is not None else None
    observers += [*([] if doctor is None else [doctor]), *build_callbacks(run.callbacks)]
    called = [clock, history, *callbacks, *observers, *([SameEverywhere(data)] if parts else [])]
    trainer = build_trainer(run, folder, module.recipe, batches, called, wrong, digits)
    kept = trainer.strategy.root_device.type == "cpu" and run.runtime.keep_memory and keep_freed_memory()
    start, changed = _resume_from(run, folder, module, trainer)
    if seed == run.seed:
        header = [
            *header,
            *module.said,
            capacity(parameters, data.sizes["train"], is_images(spec)),
            *([parts] if parts else []),
            *([taught] if taught else []),
            *_levers(run, trainer, wrong, kept, digits, is_images(spec)),
        ]
    bar: Any = trainer.progress_bar_callback
    bar.header = [*header, *changed]
    interrupted = _fitted(trainer, module, data, start, clock)
    data.trainer = None
    calibrated = calibrate(module, data) if run.calibrate and not interrupted else None
    if trainer.is_global_zero and not interrupted:
        final = {"state_dict": module.state_dict(), "knep": module.about}
        checkpoint.write(final, folder / "checkpoints" / "final.ckpt")
    metric, mode = run.watched
    return Member(
        module=module,
        folder=folder,
        logger=trainer.loggers[0] if trainer.loggers else None,
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        best=history.best(metric, mode) if history.rows else {},
        samples_per_second=clock.samples_per_second,
        stopped_early=getattr(module.recipe.stopping, "stopped_epoch", 0) > 0,
        interrupted=interrupted,
        findings=doctor.findings if doctor else (),
        stopped_by=doctor.stopped_by if doctor else None,
        averaged=getattr(module.recipe.averaging, "said", None),
        calibrated=calibrated,
    )


def _fitted(trainer: Trainer, module: Classifier, data: ImageData, start: str | None, clock: Clock) -> int:
    """Lets Lightning fit, from the checkpoint `start`; the signal that stopped it, 0 where it ended by itself."""
    try:
        with quick_checks(), deaths_named(trainer):
            trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except Interrupted as asked:
        return asked.number
    except MisconfigurationException as error:  # what Lightning finds out only when it has the data
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY in str(error):
            raise OutOfMemory(_out_of_memory(data, trainer.global_step)) from error
        if start is None or clock.began or isinstance(error, InputError):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise InputError(f"{start} cannot be gone on from ({what}): give another checkpoint") from error
    return 0


def _device(run: RunConfig) -> torch.device:
    """Where a step will be computed, before there is a Trainer."""
    on_gpu = run.trainer.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _out_of_memory(data: ImageData, step: int) -> str:
    """What a step that did not fit comes to."""
    smaller = max(1, data.batch_size // 2)
    return (
        f"out of memory in step {step}, with {data.batch_size} rows at once: write data.micro={smaller}, which adds up "
        "the gradients of smaller parts, or data.micro=auto"
    )


def _levers(
    run: RunConfig, trainer: Trainer, wrong: str | None, kept: bool, digits: str | None, images: bool
) -> list[str]:
    device = trainer.strategy.root_device
    auto = run.trainer.precision == "auto" and not digits
    why = why_not_bf16(wrong) if auto and device.type == "cpu" else None
    lean = isinstance(trainer.fit_loop.epoch_loop, LeanEpoch)
    line = levers(run, trainer.precision, device, lean, trainer.world_size, kept, digits, images)
    return [*([why] if why else []), line]


def check_resume(run: RunConfig, folder: Path) -> None:
    """Raises InputError where a run cannot go on from what its `ckpt` means for a member in `folder`."""
    found = _stored(run, folder, warn=False)
    if (folder / "metrics.csv").is_file():
        earlier_rows(folder / "metrics.csv")
    if found is None:
        return
    path, state = found
    _changes(run, path, state)
    with torch.random.fork_rng():
        check_stored_run(path, state, stored_module(path, state))


def stored_facts(run: RunConfig, folder: Path) -> Mapping[str, Any]:
    """What the checkpoint that `ckpt` means for a run in `folder` tells of its data; nothing where there is none."""
    places = [place for place in sorted(folder.glob("member_*")) if place.is_dir()] or [folder]
    for place in places:
        found = _stored(run, place, warn=False)
        if found is not None and isinstance(found[1]["knep"], dict):
            return found[1]["knep"]
    return {}


def _stored(run: RunConfig, folder: Path, warn: bool = True) -> tuple[Path, Mapping[str, Any]] | None:
    """The checkpoint to go on from, and what is in it; None for a member that starts."""
    saved = saved_of(run.resume.ckpt, run.members > 1, folder)
    if saved is None:
        return None
    path = find_whole(saved, warn)
    state = read_checkpoint(path)
    if "loops" not in state:
        raise InputError(f"ckpt={path} holds weights only and cannot be resumed: give the run folder or last.ckpt")
    for key, kind in _LOOPS.items():
        if not isinstance(state.get(key), kind) or state[key] == []:
            raise InputError(f"{path} was not written by knep: it has no {key}, give another checkpoint")
    read_facts(path, state)
    return path, state


def _changes(run: RunConfig, path: Path, state: Mapping[str, Any]) -> list[Change]:
    counted: Any = state
    for key in ("loops", "fit_loop", "epoch_progress", "current", "completed"):
        counted = counted.get(key) if isinstance(counted, Mapping) else None
    if whole()(counted):
        raise InputError(f"{path} was not written by knep: it has no count of epochs, give another one")
    return changes(state["knep"]["config"], run.plain, state["global_step"], counted)


def _resume_from(run: RunConfig, folder: Path, module: Classifier, trainer: Trainer) -> tuple[str | None, list[str]]:
    """The checkpoint to go on from, None for a member that starts, and lines on what has changed since."""
    found = _stored(run, folder, trainer.is_global_zero)
    if found is None:
        _log_from(trainer, 0)
        return None, []
    path, state = found
    load_weights(module, state.get("current_model_state", state["state_dict"]), path)
    step = state["global_step"]
    changed = _changes(run, path, state)
    if changed:
        trainer.callbacks.append(Apply(changed))  # type: ignore[attr-defined]
    _log_from(trainer, step)
    return str(path), [f"knep: {said(changed, run.plain, step)}"] if changed else []


def _log_from(trainer: Trainer, step: int) -> None:
    """Drops what an earlier life in this folder logged behind the step from which this one goes on."""
    for logger in trainer.loggers:
        getattr(logger, "forget_after", lambda step: None)(step)


# A model with this many parameters per training image can memorise them; see Zhang et al. 2017.
_MANY = 100


def is_images(spec: DataSpec) -> bool:
    return len(spec.row) == 3


def capacity(parameters: int, images: int, are_images: bool = True) -> str:
    """One line that weighs the model against its data, with a warning where it can memorise them."""
    ratio, what = parameters / images, "image" if are_images else "row"
    line = f"capacity: {parameters:,} parameters for {images:,} training {what}s ({ratio:,.1f} per {what})"
    if ratio > _MANY:
        line += "; warning: enough to memorise them, so expect overfitting without augment, dropout or stopping"
    return line

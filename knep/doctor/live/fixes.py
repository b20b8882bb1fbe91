"""What can be mended while a run goes on: rates, momentum, decay and clipping."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer

from knep.doctor.findings import Finding, diseases
from knep.engine.step import Step
from knep.recipes import clip as clips

_CLIP = 1.0  # the norm to which a run without clipping is clipped
_MOMENTUM = 0.9


def mend(module: LightningModule, trainer: Trainer, finding: Finding) -> str | None:
    """Changes the run so that the disease may end; returns what was done in words, None where nothing can be.

    module: knep's Classifier or anybody's. Only what the next steps read is changed: the weights stay.
    """
    match finding.about.running:
        case "rate" if finding.overrides:
            return _rate(trainer, finding)
        case "momentum":
            return _steady(trainer)
        case "decay":
            return _keep_weights(trainer)
        case "clip":
            return _clip(module, trainer)
        case "unclip":
            return _unclip(module, trainer)
    return None


def again(module: LightningModule, trainer: Trainer, cures: Mapping[str, str]) -> None:
    """Does anew to a run that goes on what its checkpoint does not hold: clipping. cures: disease -> what was done.

    Rates, momentum and decay are in the states of the optimizer and the schedule.
    """
    done = {diseases()[name].running for name in cures}
    if "unclip" in done:
        _unclip(module, trainer)
    if "clip" in done:
        _clip(module, trainer)


def scale_rates(trainer: Trainer, factor: float) -> float:
    """Multiplies every learning rate, now and in the schedule's later course; returns the largest one."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
            if "initial_lr" in group:
                group["initial_lr"] *= factor
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]
    return max(float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)


def _rate(trainer: Trainer, finding: Finding) -> str:
    """The prescribed rate, where the schedule is now: `optimizer.lr=...` against the largest rate of all groups."""
    wanted = float(finding.overrides[0][0].partition("=")[2])
    now = max(float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
    factor = wanted / now if now > 0 else 1.0
    return f"learning rate x {factor:.3g}, now {scale_rates(trainer, factor):.3g}"


def _steady(trainer: Trainer) -> str | None:
    done = None
    for group in (g for optimizer in trainer.optimizers for g in optimizer.param_groups):
        if group.get("momentum", 0) > _MOMENTUM:
            group["momentum"], done = _MOMENTUM, f"momentum {_MOMENTUM}"
        elif "betas" in group and group["betas"][0] > _MOMENTUM:
            group["betas"], done = (_MOMENTUM, *group["betas"][1:]), f"first beta {_MOMENTUM}"
    return done


def _keep_weights(trainer: Trainer) -> str | None:
    groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups if g.get("weight_decay")]
    for group in groups:
        group["weight_decay"] *= 0.01
    return f"weight decay x 0.01, now {max(g['weight_decay'] for g in groups):.3g}" if groups else None


def _step_of(module: LightningModule) -> Step | None:
    """The step of knep's own module; None of anybody else's."""
    step = getattr(module, "step", None)
    return step if isinstance(step, Step) else None


def _unclip(module: LightningModule, trainer: Trainer) -> str | None:
    step = _step_of(module)
    if step is not None:
        step.clip_by(clips.none)
    elif trainer.gradient_clip_val:
        trainer.gradient_clip_val = None
    else:
        return None
    return "clipping off"


def _clip(module: LightningModule, trainer: Trainer) -> str | None:
    step = _step_of(module)
    if step is None:
        if trainer.gradient_clip_val or not module.automatic_optimization:
            return None
        trainer.gradient_clip_val = _CLIP
        return f"clipping to norm {_CLIP:g}"
    if step.clips:
        return None
    step.clip_by(functools.partial(clips.norm, theta=_CLIP))
    return f"clipping to norm {_CLIP:g}"

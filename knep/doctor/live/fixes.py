"""What can be mended while a run goes on: rates, momentum, decay and clipping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer

from knep.doctor.findings import Finding
from knep.engine.module import Classifier
from knep.recipes import clip as clips

_CLIP = 1.0  # the norm to which a run without clipping is clipped
_MOMENTUM = 0.9


def mend(module: Classifier, trainer: Trainer, finding: Finding) -> str | None:
    """Changes the run so that the disease may end; returns what was done in words, None where nothing can be.

    module: knep's Classifier; trainer: Lightning's. Only what the next steps read is changed: the weights stay.
    """
    way = _WAYS.get(finding.disease)
    return way(module, trainer, finding) if way else None


def again(module: Classifier, cures: Mapping[str, str]) -> None:
    """Does anew to a run that goes on what its checkpoint does not hold: clipping. cures: disease -> what was done.

    Rates, momentum and decay are in the states of the optimizer and the schedule.
    """
    for name in ("clip_throttles", "loss_spikes", "exploding_gradient"):
        if name in cures:
            _WAYS[name](module, None, Finding(name, "", 0.0))


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


def _rate(module: Classifier, trainer: Trainer, finding: Finding) -> str:
    """The prescribed rate, where the schedule is now: `optimizer.lr=...` against the largest rate of all groups."""
    wanted = float(finding.overrides[0][0].partition("=")[2])
    now = max(float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
    factor = wanted / now if now > 0 else 1.0
    return f"learning rate x {factor:.3g}, now {scale_rates(trainer, factor):.3g}"


def _steady(module: Classifier, trainer: Trainer, finding: Finding) -> str | None:
    done = None
    for group in (g for optimizer in trainer.optimizers for g in optimizer.param_groups):
        if group.get("momentum", 0) > _MOMENTUM:
            group["momentum"], done = _MOMENTUM, f"momentum {_MOMENTUM}"
        elif "betas" in group and group["betas"][0] > _MOMENTUM:
            group["betas"], done = (_MOMENTUM, *group["betas"][1:]), f"first beta {_MOMENTUM}"
    return done


def _keep_weights(module: Classifier, trainer: Trainer, finding: Finding) -> str | None:
    groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups if g.get("weight_decay")]
    for group in groups:
        group["weight_decay"] *= 0.01
    return f"weight decay x 0.01, now {max(g['weight_decay'] for g in groups):.3g}" if groups else None


def _unclip(module: Classifier, trainer: Trainer, finding: Finding) -> str:
    module.step.clip_by(clips.none)
    return "clipping off"


def _clip(module: Classifier, trainer: Trainer, finding: Finding) -> str | None:
    if module.step.clips:
        return None
    module.step.clip_by(functools.partial(clips.norm, theta=_CLIP))
    return f"clipping to norm {_CLIP:g}"


_WAYS: Mapping[str, Callable[[Any, Any, Finding], str | None]] = {
    "lr_too_high": _rate,
    "lr_too_low": _rate,
    "momentum_instability": _steady,
    "weight_decay_too_large": _keep_weights,
    "clip_throttles": _unclip,
    "loss_spikes": _clip,
    "exploding_gradient": _clip,
}

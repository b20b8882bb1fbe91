"""Other values on resume: applied and named in one line, or refused; never left out in silence.

What a checkpoint restores would win over what the user wrote: this table says which keys may differ from the run that
goes on, and `Apply` puts the new values where the checkpoint has put the old ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from knep.config.moved import with_current_names
from knep.config.schema import completed
from knep.errors import InputError

# How a run is watched, saved, and where it lies: what it computes stays the same.
_HARMLESS = (
    "allow_targets",
    "budget.*",
    "checkpoint.*",
    "ckpt",
    "data.cache",
    "data.max_pixels",
    "data.workers",
    "data.write_cache",
    "doctor.*",
    "keep_memory",
    "lean",
    "log_every",
    "name",
    "profile",
    "progress",
    "resume",
    "slurm.*",
    "threads",
    "trainer.limit_test_batches",
)
# Rebuilt from the config when a run goes on, or put back by `Apply`.
_APPLIED = (
    "augment.*",
    "channels_last",
    "clip.*",
    "compile",
    "data.root",
    "dropout.p",
    "guard",
    "guard.*",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.lr",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "regularization.*",
    "scheduler.*",
    "stopping.min_delta",
    "stopping.patience",
    "trainer.accelerator",
    "trainer.deterministic",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.precision",
)
_LENGTH = ("trainer.max_epochs", "trainer.max_steps")
# Of the keys above, those that hold state which another value would contradict.
_REFUSED = ("scheduler._target_", "scheduler.interval", "scheduler.monitor", "dropout._target_")
_WHY = {
    "model": "the weights are of another model",
    "norm": "the weights are of another model",
    "activation": "the weights are of another model",
    "task": "the weights are of another task",
    "loss": "the optimizer's state is of another loss",
    "sampling": "the rows already drawn were others",
    "metrics": "the best epoch so far is by others",
    "seed": "every random draw would differ from those already made",
    "data": "the images and their order would differ from those already seen",
    "accumulate": "the steps already made would have other batches",
    "optimizer": "the optimizer's state is of other settings",
    "scheduler": "the scheduler's state is of other settings",
    "averaging": "the averages so far are of other settings",
    "stopping": "the best value so far is of other settings",
}
_MISSING = "(absent)"


@dataclass(frozen=True)
class Change:
    """One value that differs from the run that goes on."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{_shown(self.key)}: {_shown(self.old)} -> {_shown(self.new)}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any], steps: int, epochs: int) -> list[Change]:
    """The values of `now` to apply to a run that was trained for so long with `before`, both configs.

    Raises InputError naming the first one that a run cannot change, and why.
    """
    both = (completed(with_current_names(config)) for config in (before, now))
    found = [c for c in _differences(*both) if not _in(c.key, _HARMLESS)]
    for change in found:
        if change.key == "trainer.max_epochs" and change.new < epochs:
            raise InputError(f"{change}, but this run has {epochs} epochs already: write {epochs} or more")
        if _in(change.key, _refused(now)) or not _in(change.key, _APPLIED):
            why = _WHY.get(change.key.partition(".")[0], "what was trained so far depends on it")
            raise InputError(
                f"{change} cannot change after {steps} steps, {why}: leave it out, or start a new run without ckpt="
            )
    return found


def said(found: Sequence[Change], now: Mapping[str, Any], steps: int) -> str:
    """One line that names the applied values."""
    values = ", ".join(str(change) for change in found)
    longer = any(change.key in _LENGTH for change in found) and not _in(_schedule(now), ("none", "constant", "plateau"))
    return f"{values}, applied from step {steps}" + (", on the schedule of the new length" if longer else "")


def _refused(now: Mapping[str, Any]) -> tuple[str, ...]:
    # Knep's schedules are functions of the step, save plateau: it and a user's own keep rates in their state.
    return _REFUSED if _schedule(now) not in ("", "plateau") else (*_REFUSED, "scheduler.*", "optimizer.lr")


def _schedule(now: Mapping[str, Any]) -> str:
    """The name of one of knep's schedules, or nothing."""
    room, _, name = str(now["scheduler"]["_target_"]).rpartition(".")
    return name if room == "knep.recipes.scheduler" else ""


def _shown(value: object) -> str:
    """On one line, without what a terminal would obey: a config may come from a stranger's checkpoint."""
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _in(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    old, new = dict(_flat(before)), dict(_flat(now))
    sections = set(before)
    for key in dict.fromkeys([*old, *new]):
        # A whole section that is new came with a later knep; within one, a key is the user's.
        if key.partition(".")[0] in sections and old.get(key, _MISSING) != new.get(key, _MISSING):
            yield Change(key, old.get(key, _MISSING), new.get(key, _MISSING))


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Apply(Callback):
    """Puts changed values over those that a checkpoint restores, before the first step that follows."""

    def __init__(self, found: list[Change]) -> None:
        self._found = {change.key: change for change in found}
        self._settings = [
            k.partition(".")[2] for k in self._found if k.startswith("optimizer.") and k != "optimizer.lr"
        ]
        self._fresh: list[list[dict[str, Any]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers are as the config has them now, callbacks as the checkpoint had them."""
        plain = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in trainer.optimizers]
        self._fresh = plain
        for name in self._settings:
            if not all(name in group for groups in plain for group in groups):
                change = self._found[f"optimizer.{name}"]
                raise InputError(f"{change} cannot be given to this optimizer once it runs: leave it out")
        patience = self._found.get("stopping.patience")
        if patience is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EarlyStopping):
                    callback.patience = patience.new

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers and schedulers are as the checkpoint had them."""
        for optimizer, fresh in zip(trainer.optimizers, self._fresh, strict=True):
            for group, wanted in zip(optimizer.param_groups, fresh, strict=True):
                group.update({name: wanted[name] for name in self._settings})
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
        if "optimizer.lr" in self._found:
            for optimizer, fresh in zip(trainer.optimizers, self._fresh, strict=True):
                _rescale(optimizer, [_base(group) for group in fresh], schedulers)
        for scheduler in schedulers:
            if isinstance(scheduler, LambdaLR):  # the rate of the next step, by the schedule as it is now
                pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, scheduler.optimizer.param_groups, strict=True)
                for base, factor, group in pairs:
                    group["lr"] = base * factor(scheduler.last_epoch)
                scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _base(group: Mapping[str, Any]) -> float:
    return group.get("initial_lr", group["lr"])


def _rescale(optimizer: Optimizer, wanted: list[float], schedulers: list[LRSchedulerTypeUnion]) -> None:
    """Gives the groups these base rates; what a schedule has made of the old ones, it has made of the new."""
    for group, base in zip(optimizer.param_groups, wanted, strict=True):
        group["lr"] *= base / _base(group)
        if "initial_lr" in group:
            group["initial_lr"] = base
    for scheduler in schedulers:
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = list(wanted)

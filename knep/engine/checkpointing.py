"""When a run is saved, and what a checkpoint holds beside Lightning's: enough to go on to the bit.

Saved only where the loops' counters agree: between two batches, and after everything that ends an epoch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import Optimizer

from knep.engine.loops.accumulation import inside_window
from knep.engine.loops.interrupts import StopOnSignal
from knep.errors import InputError, Interrupted
from knep.io import checkpoint
from knep.io.find_checkpoint import find_whole
from knep.io.run_folder import check_there
from knep.utils.rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from knep.engine.module import Classifier

BEST = "best.ckpt"
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def interval(every: object) -> tuple[int, float]:
    """(optimizer steps, seconds) between checkpoints inside an epoch; the one that is not meant is 0.

    every: None, a number of steps, or a time such as "30s", "5m", "1h". Raises InputError for anything else.
    """
    if every is None:
        return 0, 0.0
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return every, 0.0
    timed = re.fullmatch(r"(\d{1,6})([smh])", str(every))
    if timed and int(timed[1]) > 0:
        return 0, float(int(timed[1]) * _SECONDS[timed[2]])
    raise InputError(
        f"checkpoint.every={every} is no interval: write a number of optimizer steps such as 200, a time such as 30s, "
        "5m or 1h, or null for the ends of epochs alone"
    )


class Best(ModelCheckpoint):
    """The checkpoint of the best validation; the keeper saves it at the first place where a run can go on from."""

    due = False
    on_train_batch_end = Callback.on_train_batch_end  # nothing to do between validations

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.due = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, without the folder: a run may be moved, and its file is the same one wherever it lies."""
        state = super().state_dict()
        del state["dirpath"]
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = Path(state[key]).name
        return state | {"best_k_models": {Path(path).name: score for path, score in state["best_k_models"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the scores, and whether there is a file; where it lies is this run's own to say."""
        for name in ("best_model_score", "current_score", "kth_value"):
            setattr(self, name, state_dict[name])
        own = str(Path(str(self.dirpath)) / BEST) if state_dict["best_model_path"] else ""
        self.best_model_path = self.kth_best_model_path = own
        self.best_k_models = {own: state_dict["best_model_score"]} if own else {}

    def save_if_due(self, trainer: Trainer) -> None:
        if self.due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self.due = False


class Keeper(Callback):
    """Saves `last.ckpt` at each end of an epoch, every so often inside one, and when the run is asked to stop.

    every: see `interval`; the loops of `knep.engine.loops.exact` call `after_batch` and `after_epoch`.
    resumed: where the checkpoint was saved that this fit goes on from, "batch" or "epoch"; None for any other start.
    """

    def __init__(self, every: object, best: Best, stop: StopOnSignal) -> None:
        self._steps, self._seconds = interval(every)
        self._best, self._stop = best, stop
        self._place: str | None = None
        self._loaded: dict[str, Any] = {}
        self._saved_step, self._saved_time = -1, time.monotonic()
        self._watches = bool(self._steps or self._seconds)

    @property
    def resumed(self) -> str | None:
        return self._loaded.get("place")

    def after_batch(self, trainer: Trainer) -> None:
        """Between two batches of an epoch."""
        alone = trainer.world_size == 1
        if alone and not (self._stop.asked or self._best.due or self._watches):
            return
        if not alone and inside_window(trainer):
            return  # the gradients of a window under way differ from process to process
        self._place = "batch"
        stop = self._asked(trainer)
        due = self._due(trainer)
        if stop or due or self._best.due:
            self._settle(trainer)
        self._best.save_if_due(trainer)
        if stop or due:
            self._save(trainer)
        self._place = None
        if stop:
            raise Interrupted(stop)

    def after_epoch(self, trainer: Trainer) -> None:
        """After validation, schedulers and logs of an epoch."""
        self._place = "epoch"
        self._settle(trainer)
        self._best.save_if_due(trainer)
        self._save(trainer)
        self._place = None
        stop = self._asked(trainer)
        if stop:
            raise Interrupted(stop)

    def _asked(self, trainer: Trainer) -> int:
        """The signal that this or another process was sent, or 0."""
        if trainer.world_size == 1:
            return self._stop.asked
        some = trainer.strategy.reduce_boolean_decision(bool(self._stop.asked), all=False)
        return (self._stop.asked or 2) if some else 0

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self._steps:
            return step % self._steps == 0 and step != self._saved_step
        if not self._seconds:
            return False
        due = time.monotonic() - self._saved_time >= self._seconds
        return due if trainer.world_size == 1 else trainer.strategy.broadcast(due)

    def _settle(self, trainer: Trainer) -> None:
        """What a checkpoint's past has logged must be on disk before it: nobody repeats those steps."""
        check_there()
        module = cast("Classifier", trainer.lightning_module)
        if module.sentry is not None:
            module.sentry.before_save()
        if self._place == "batch":
            module.dynamics.write(trainer.loggers)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
            elif self._place == "batch":
                logger.save()

    def _save(self, trainer: Trainer) -> None:
        # A full copy beside best.ckpt, not a link to it: where one of the two is damaged, the other goes on.
        if trainer.fast_dev_run:  # type: ignore[truthy-function]
            return
        trainer.save_checkpoint(_last(trainer))
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            getattr(callback, "after_save", _nothing)(trainer)

    def catch_up(self, trainer: Trainer) -> None:
        """Makes last.ckpt what this fit goes on from, where a kill came between it and a newer best.ckpt.

        A run that had trained to its end would never save it again.
        """
        last, source = _last(trainer), Path(str(trainer.ckpt_path))
        beside = trainer.is_global_zero and source.is_file() and source.resolve().parent == last.resolve().parent
        if beside and source.name != last.name and find_whole(trainer.default_root_dir, warn=False).name == source.name:
            checkpoint.copy(source, last)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._place is None:
            return  # somebody else's checkpoint, taken where counters disagree: Lightning resumes it as it can
        checkpoint["exact"] = {
            "place": self._place,
            "rng": rng_state(pl_module.device),
            "metrics": dict(trainer.callback_metrics),
            "gradients": _window(trainer, pl_module),
            "states": [states_in(state) for state in checkpoint["optimizer_states"]],
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get("exact", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restore(trainer, pl_module)

    def restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts back what the checkpoint kept of the moment, once the model is on its device."""
        for optimizer in trainer.optimizers:
            _lay_out(optimizer)
        if not self._loaded:
            return
        set_rng_state(self._loaded["rng"], pl_module.device)
        trainer.callback_metrics.update(self._loaded["metrics"])
        for name, p in pl_module.named_parameters():
            kept = self._loaded["gradients"].get(name)
            if kept is not None:
                p.grad = kept.to(p.device)
        self._saved_step = trainer.global_step


def states_in(optimizer: Mapping[str, Any]) -> int:
    """Of how many parameters an optimizer's state_dict has a state: those without are ones that met no gradient."""
    return sum(bool(state) for state in optimizer["state"].values())


def _lay_out(optimizer: Optimizer) -> None:
    """Gives loaded state the memory format that its parameters have now: fused kernels read both in one order."""
    for p, state in optimizer.state.items():
        for key, t in state.items() if isinstance(state, dict) else ():
            if isinstance(t, torch.Tensor) and t.shape == p.shape and t.stride() != p.stride():
                state[key] = torch.empty_like(p, dtype=t.dtype).copy_(t)


def _last(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def _nothing(trainer: Trainer) -> None:
    pass


def has_ended(trainer: Trainer) -> bool:
    """Whether early stopping had come to its end when the checkpoint was saved."""
    stoppers = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    return any(c.wait_count >= c.patience for c in stoppers)


def _window(trainer: Trainer, module: LightningModule) -> dict[str, torch.Tensor]:
    """Gradients of an accumulation window under way, by parameter; none between windows."""
    if not inside_window(trainer):
        return {}
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

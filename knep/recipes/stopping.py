"""`stopping`: when training ends. A callback `f(**hp)`; acts after each validation, on validation metrics only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils._pytree import tree_map_only

from knep.io.checkpoint import read
from knep.recipes.averaging import Ema, Soup, Swa
from knep.utils.monitors import logged, of_other_split

__all__ = ["Early", "none"]


def none() -> Callback:
    """Trains for all epochs; the last weights are the ones tested."""
    return Callback()


def stops(stopping: EarlyStopping, value: Tensor) -> bool:
    """Shows a callback the metric that it watches (0-dim), in a loop that is not Lightning's; whether training ends."""
    return stopping._evaluate_stopping_criteria(value)[0]


class Early(EarlyStopping):
    """Stops when the monitored metric has not improved for `patience` validations, and goes back to its best epoch.

    Prechelt, "Early stopping - but when?" (1998): criterion UP by count. The weights of the best epoch, not of the
    last, are in the module when `fit` returns; under averaging=soup those of the soup.

    monitor: a logged metric, of the validation split by its name; patience: validations; min_delta: least change that
    counts, in units of the metric; mode: "min" or "max".
    Raises ValueError for a monitor of the test split, a negative patience or an unknown mode.
    """

    def __init__(
        self, *, monitor: str = "val/loss", patience: int = 10, min_delta: float = 0.0, mode: str = "min"
    ) -> None:
        if of_other_split(monitor):
            raise ValueError(f"monitor must be a validation metric such as val/loss or val_acc, got {monitor}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 validation, got {patience}")
        if min_delta < 0:
            raise ValueError(f"min_delta must not be negative, got {min_delta}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {mode}")
        super().__init__(
            monitor=monitor,
            patience=patience,
            min_delta=min_delta,
            mode=mode,
            check_finite=False,
            check_on_train_epoch_end=False,  # a run that max_steps ends inside an epoch has no metric there
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        averages: list[Any] = [c for c in trainer.callbacks if isinstance(c, (Ema, Swa, Soup))]  # type: ignore[attr-defined]
        if any(isinstance(c, Soup) and c.count for c in averages):
            return
        checkpoint = self._best(trainer)
        if checkpoint is not None:
            pl_module.load_state_dict(checkpoint["state_dict"])
            for average in averages:
                average.went_back(checkpoint)

    def _best(self, trainer: Trainer) -> Mapping[str, Any] | None:
        """The checkpoint of the best epoch, from memory or from its file; None where nobody kept one."""
        for one in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(one, BestInMemory) and one.checkpoint is not None:
                return one.checkpoint
        keepers = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
        path = next((c.best_model_path for c in keepers if c.monitor == self.monitor), "")
        return read(Path(path)) if path and Path(path).is_file() else None


class BestInMemory(Callback):
    """Keeps the weights of the best epoch in memory, for a fit that writes no checkpoints; of each process its own.

    monitor, mode: as for `Early`. checkpoint: the entries `state_dict` and, of an average, `averaging_state`.
    """

    def __init__(self, monitor: str, mode: str) -> None:
        self.monitor, self.mode = monitor, mode
        self.score: float | None = None
        self.checkpoint: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.score = self.checkpoint = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = float(logged(trainer, self.monitor))
        sign = 1 if self.mode == "min" else -1
        better = self.score is None or not sign * self.score <= sign * score
        if trainer.strategy.reduce_boolean_decision(better):
            # As a file would have it, with what callbacks put there. Lightning has no public word for it.
            whole = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            kept = {key: whole[key] for key in ("state_dict", "averaging_state") if key in whole}
            self.score, self.checkpoint = score, tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), kept)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "checkpoint": self.checkpoint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.checkpoint = state_dict["score"], state_dict["checkpoint"]

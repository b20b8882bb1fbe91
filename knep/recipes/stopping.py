"""`stopping`: when training ends. A callback `f(**hp)`; acts after each validation, on validation metrics only."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from knep.io.checkpoint import read
from knep.recipes.averaging import Ema, Soup, Swa

__all__ = ["Early", "none"]


def none() -> Callback:
    """Trains for all epochs; the last weights are the ones tested."""
    return Callback()


class Early(EarlyStopping):
    """Stops when the monitored metric has not improved for `patience` validations, and goes back to its best epoch.

    Prechelt, "Early stopping - but when?" (1998): criterion UP by count. The weights of the best epoch, not of the
    last, are in the module when `fit` returns; under averaging=soup those of the soup.

    monitor: a logged metric of the validation split; patience: validations; min_delta: least change that counts, in
    units of the metric; mode: "min" or "max".
    Raises ValueError for a monitor of the test split, a negative patience or an unknown mode.
    """

    def __init__(
        self, *, monitor: str = "val/loss", patience: int = 10, min_delta: float = 0.0, mode: str = "min"
    ) -> None:
        if not monitor.startswith("val/"):
            raise ValueError(f"monitor must be a validation metric such as val/loss or val/acc, got {monitor}")
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
        keeper = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor), None)
        path = keeper.best_model_path if keeper else ""
        averages: list[Any] = [c for c in trainer.callbacks if isinstance(c, (Ema, Swa, Soup))]  # type: ignore[attr-defined]
        if any(isinstance(c, Soup) and c.count for c in averages):
            return
        if path and Path(path).is_file():
            checkpoint = read(Path(path))
            pl_module.load_state_dict(checkpoint["state_dict"])
            for average in averages:
                average.went_back(checkpoint)

"""What a run's own callbacks count and keep beside Lightning's."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from knep.tasks.base import Batch


class Clock(Callback):
    """Seconds and images of the training batches alone, validation and logging of epochs left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self.began = False  # whether a batch was trained on
        self._began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.began = True
        if batch_idx == 0 or not self._began:
            self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self.images += len(batch[0]) * trainer.world_size
        if trainer.is_last_batch:
            self.seconds += time.perf_counter() - self._began
            self._began = 0.0

    @property
    def samples_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class History(Callback):
    """The validation metrics of every epoch, kept in the checkpoint."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self.rows.append({"epoch": trainer.current_epoch} | metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def best(self, monitor: str, mode: str) -> dict[str, float]:
        """The row of the best epoch by a validation metric."""
        sign = 1 if mode == "min" else -1
        return min(self.rows, key=lambda row: sign * row[monitor])

"""The best epoch's weights in the fit of any LightningModule: in a file, or in memory where the Trainer writes none."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from knep.recipes.stopping import BestInMemory


class BestFile(ModelCheckpoint):
    """Writes best.ckpt; a type of its own, beside a ModelCheckpoint of the user's."""


class Best(BestInMemory):
    """Keeps the weights to which stopping goes back.

    No ModelCheckpoint itself, which Lightning refuses beside enable_checkpointing=False: it brings one to a fit that
    writes checkpoints, and keeps the weights in memory in another.
    """

    def __init__(self, monitor: str, mode: str) -> None:
        self._file = BestFile(filename="best", monitor=monitor, mode=mode)
        self._on_disk = False
        super().__init__(monitor, mode)

    @property
    def monitor(self) -> str:
        return self._monitor

    @monitor.setter
    def monitor(self, name: str) -> None:
        self._monitor = self._file.monitor = name

    @property
    def best_score(self) -> float | Tensor | None:
        return self._file.best_model_score if self._on_disk else self.score

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        theirs = [c for c in trainer.checkpoint_callbacks if not isinstance(c, BestFile)]
        mine = self._file in callbacks
        self._on_disk = bool(theirs) or mine
        if not self._on_disk or mine:
            return
        # Lightning puts those that write checkpoints last, and takes the first of them as ckpt_path="best".
        named = any(getattr(c, "monitor", None) for c in theirs)
        place = len(callbacks) if named else callbacks.index(theirs[0])
        others = [c for c in callbacks if not isinstance(c, BestFile)]
        place -= sum(isinstance(c, BestFile) for c in callbacks[:place])
        callbacks[:] = [*others[:place], self._file, *others[place:]]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._on_disk:
            super().on_validation_end(trainer, pl_module)

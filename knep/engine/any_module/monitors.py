"""The metric that stopping, averaging and a schedule follow, by the name under which a module logs it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from knep.errors import InputError

_VALIDATION = {"valid": "val", "validation": "val", "dev": "val", "eval": "val"}


class Monitors(Callback):
    """Refuses to fit where nobody logs what a slot watches; takes `val_loss` for `val/loss`, and says so.

    watched: slot -> metric; holders: callbacks that have it as their `monitor`.
    """

    def __init__(self, watched: dict[str, str], holders: list[Any]) -> None:
        self._watched, self._holders = watched, [h for h in holders if getattr(h, "monitor", None)]
        self.renamed: dict[str, str] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for slot, monitor in self._watched.items():
            what = "stops" if slot == "stopping" else f"chooses its {slot}"
            if trainer.barebones:
                raise InputError(
                    f"the recipe {what} by {monitor}, and Trainer(barebones=True) logs nothing: leave barebones out, "
                    f"or load the recipe with {slot}=none"
                )
            if not trainer.enable_validation:
                raise InputError(
                    f"the recipe {what} by {monitor}, and fit got no validation data: give val_dataloaders, or load "
                    f"the recipe with {slot}=none"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        if trainer.sanity_checking and not metrics and len(trainer.num_val_batches) > 1:
            return  # of several loaders Lightning keeps no metric of the sanity check
        for slot, monitor in self._watched.items():
            if self.renamed.get(monitor, monitor) in metrics:
                continue
            same = [name for name in metrics if words(name) == words(monitor)]
            if len(same) != 1:
                there = ", ".join(sorted(metrics))
                raise InputError(
                    f"{slot}.monitor={monitor} is not logged in validation: name one of {there or 'those that you log'}"
                    f", or load the recipe with {slot}=none"
                )
            self._rename(trainer, {monitor: same[0]})

    def _rename(self, trainer: Trainer, names: dict[str, str]) -> None:
        self.renamed.update(names)
        for holder in self._holders:
            holder.monitor = names.get(holder.monitor, holder.monitor)
        for config in trainer.lr_scheduler_configs if trainer.optimizers else []:
            if config.monitor in names:
                config.monitor = names[config.monitor]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rename(trainer, self.renamed)  # of a run that goes on

    def state_dict(self) -> dict[str, Any]:
        return {"renamed": self.renamed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Before the holders load theirs, whose keys name the metric."""
        self.renamed = dict(state_dict["renamed"])
        for holder in self._holders:
            holder.monitor = self.renamed.get(holder.monitor, holder.monitor)


def words(name: str) -> tuple[str, ...]:
    """The words of a metric's name in one order: ("loss", "val") for val/loss, valid_loss and loss-validation."""
    parts = name.lower().replace("/", "_").replace("-", "_").replace(".", "_").split("_")
    return tuple(sorted(_VALIDATION.get(part, part) for part in parts if part not in ("", "epoch")))

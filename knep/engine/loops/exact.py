"""Lightning's loops, with the two places where a run is saved, and the way back to them.

Lightning saves inside its hooks, where some counters of a batch or an epoch have moved and others have not.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from knep.engine.checkpointing import Keeper, has_ended


class ExactEpoch(_TrainingEpochLoop):
    """The batches of an epoch; keeper: told between two of them."""

    keeper: Keeper

    def reset(self) -> None:
        if self.restarting and self.keeper.resumed:
            # All counters agree: this is no restart of something half done.
            self.restarting = self.trainer.fit_loop._restarting = False
            if self.keeper.resumed == "batch":
                return
        super().reset()

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        super().on_advance_end(data_fetcher)
        if not self._num_ready_batches_reached():
            self.keeper.after_batch(self.trainer)


class ExactFit(_FitLoop):
    """The epochs of a fit; keeper: told after each."""

    keeper: Keeper

    def run(self) -> None:
        if self.keeper.resumed:
            self.keeper.catch_up(self.trainer)
            self._find_place()
            self.trainer.should_stop = has_ended(self.trainer)
            if self.skip:  # trained to its end before: what follows training is still to do
                self.keeper.restore(self.trainer, self.trainer.lightning_module)
                self.on_run_end()
                return
        super().run()

    def _find_place(self) -> None:
        """Moves the loader to where it was; it was set up before the checkpoint was read."""
        self.setup_data()
        if self._combined_loader is not None and self._data_fetcher is not None:
            self._load_combined_loader_states()
            iter(self._data_fetcher)

    def on_advance_end(self) -> None:
        super().on_advance_end()
        self.keeper.after_epoch(self.trainer)

    def on_save_checkpoint(self) -> dict:
        state = super().on_save_checkpoint()
        epochs: Any = self.epoch_progress.current
        if epochs.completed == epochs.started:
            state.pop("combined_loader", None)  # an epoch that a limit on steps cut short is not gone on with
        return state


def use_exact_loops(trainer: Trainer, keeper: Keeper) -> None:
    """Gives `trainer` these loops, with the limits of its own."""
    before = trainer.fit_loop
    fit = ExactFit(trainer, before.min_epochs, before.max_epochs)
    fit.epoch_loop = ExactEpoch(trainer, before.epoch_loop.min_steps, before.epoch_loop.max_steps)
    fit.keeper = fit.epoch_loop.keeper = keeper
    trainer.fit_loop = fit

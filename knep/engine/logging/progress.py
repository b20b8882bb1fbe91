"""What is seen while a model trains: a rich bar in a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.utilities.types import STEP_OUTPUT

from knep.tasks.base import Batch
from knep.utils.batch_plan import length_of

if TYPE_CHECKING:
    from knep.engine.module import Classifier

_REFRESH = 0.5  # seconds: fast enough for the eye; drawing takes about 5 ms


class Lines(LightningBar):
    """One line per epoch; nothing is refreshed within it.

    header: lines that say what is trained, printed when nothing can be refused any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.header: list[str] = []
        self._enabled = True
        self._images = 0
        self._began = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_header()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_header()  # of a run that had come to its end before: it trains no more

    def _print_header(self) -> None:
        for text in self.header if self._enabled else ():
            print(text, flush=True)
        self.header = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._began = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        self._images += batch[0].shape[0] * trainer.world_size

    @property
    def rate(self) -> float:
        """Images per second of this epoch so far."""
        return self._images / max(time.perf_counter() - self._began, 1e-9)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled or trainer.state.fn != "fit":
            return
        train = "  ".join(f"train/{k} {v:.4f}" for k, v in cast("Classifier", pl_module).shown("train").items())
        val = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        text = "  ".join(f"{k} {v:.4f}" for k, v in val.items())
        self.line(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {train}  {text}  {self.rate:,.0f} samples/s"
        )

    def line(self, text: str) -> None:
        print(text, flush=True)


class ProgressBar(Lines):
    """A rich bar: epoch, loss, accuracy, samples/s, time left. Where there is no terminal: a line per epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._task: Any = None
        self._drawn = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not (self._enabled and sys.stdout.isatty()):
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TextColumn("{task.fields[said]}  {task.fields[rate]:,.0f} samples/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            auto_refresh=False,
        )
        steps, epochs = length_of(trainer)
        batches = epochs * trainer.num_training_batches
        total = math.ceil(batches) if batches < math.inf else int(steps) * trainer.accumulate_grad_batches
        fields: dict[str, Any] = {"epoch": 1, "epochs": trainer.max_epochs, "said": "", "rate": 0.0}
        self._task = self._bar.add_task("", total=total, **fields)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._bar is None or time.perf_counter() - self._drawn < _REFRESH:
            return
        self._drawn = time.perf_counter()
        said = "  ".join(f"{k} {v:.4f}" for k, v in cast("Classifier", pl_module).shown("train").items())
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        fields = {"epoch": trainer.current_epoch + 1, "said": said, "rate": self.rate}
        self._bar.update(self._task, completed=done, refresh=True, **fields)

    def line(self, text: str) -> None:
        if self._bar is None:
            super().line(text)
        else:
            self._bar.console.print(text, highlight=False, markup=False, emoji=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()  # Lightning tears no callback down after an exception

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

"""`averaging`: which weights are validated, saved as best and tested. A callback `f(**hp)`; acts after each step.

Every callback here has `members`: how many independent models one run trains (1 for all but `Ensemble`).
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from knep.errors import InputError
from knep.io.checkpoint import read, write
from knep.surgery.edit import cut
from knep.utils.hardware import at_precision
from knep.utils.monitors import logged

__all__ = ["Ema", "Ensemble", "Soup", "Swa", "none"]


class _Single(Callback):
    members = 1


def tell(trainer: Any, line: str) -> None:
    """One line to the user, above the progress bar where there is one."""
    if trainer.is_global_zero:
        getattr(trainer.progress_bar_callback, "line", print)(line)


def none() -> Callback:
    """The weights of the last step are used as they are."""
    return _Single()


def reestimate(trainer: Trainer, module: Any, batches: int) -> None:
    """Batch-norm statistics from `batches` batches of training images (all for 0), as the mean over batches.

    Averaged weights never saw the activations that the running statistics describe (Izmailov et al. 2018, sec. 3.2).
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.model.modules()):
        return
    read = getattr(getattr(trainer, "datamodule", None), "train_images", None)
    images = read() if read else (x for x, *_ in trainer.train_dataloader)  # type: ignore
    used = (_sane(x).to(module.device) for i, x in enumerate(images) if not batches or i < batches)
    scaled = (module.scaling(x).to(next(module.model.parameters()).dtype) for x in used)
    mode = module.model.training
    with torch.no_grad():
        update_bn(scaled, module.model)
    module.model.train(mode)


def _sane(x_NCHW: Tensor) -> Tensor:
    """The images of finite numbers alone: the guard kept the others from training too."""
    return x_NCHW[x_NCHW.flatten(1).isfinite().all(1)] if x_NCHW.is_floating_point() else x_NCHW


class _Average(WeightAveraging):
    """Validates, saves and ends with the average once there is one; until then with the current weights.

    count: weights in the average that the module ends with, an early stop's return to its best epoch included.
    """

    members = 1
    count = 0
    _unit = ("step", "steps")
    _begins = "at its first step"

    def __init__(self, bn_batches: int, **kwargs: Any) -> None:
        if bn_batches < 0:
            raise ValueError(f"bn_batches must be 0 (all) or positive, got {bn_batches}")
        super().__init__(use_buffers=False, **kwargs)
        self._bn_batches = bn_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        at_precision(trainer, pl_module)
        computed = cut(pl_module) if stage == "fit" else {}
        super().setup(trainer, copy.deepcopy(pl_module, computed) if computed else pl_module, stage)

    @property
    def started(self) -> bool:
        return self._latest_update_step > 0

    @property
    def said(self) -> str:
        """What was averaged, in words."""
        if not self.count:
            return f"nothing: the tested weights are older than the average, which begins {self._begins}"
        return f"{self.count} {self._unit[self.count > 1]}" + ("" if self.count > 1 else ", so nothing")

    def _swaps(self, trainer: Trainer) -> bool:
        """Within a fit; after it the module holds the weights that were chosen, which `validate` must not exchange."""
        return trainer.state.fn == "fit" and self._average_model is not None and self.started

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swaps(trainer):
            self._swap_models(pl_module)
            reestimate(trainer, pl_module, self._bn_batches)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swaps(trainer):
            self._swap_models(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.started:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "averaging_state" in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.started and self._average_model is not None:
            super().on_train_end(trainer, pl_module)
            reestimate(trainer, pl_module, self._bn_batches)
            self.count = int(self._average_model.n_averaged)

    def went_back(self, checkpoint: Mapping[str, Any]) -> None:
        """The module has got the weights of this checkpoint instead of the last ones."""
        self.count = int(checkpoint.get("averaging_state", {}).get("n_averaged", 0))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.count < 2:
            tell(trainer, f"averaging: {self.said}")


class Ema(_Average):
    """Exponential moving average: a <- d a + (1 - d) w after each step (Polyak and Juditsky 1992).

    It starts as the weights after the first step; the decay of the n-th update after that is
    d = min(decay, (1 + n) / (10 + n)), so that a short run is not held by its start.

    decay: in [0, 1), unitless; bn_batches: training batches for the batch-norm statistics at each validation, 0 = all.
    Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, *, decay: float = 0.999, bn_batches: int = 20) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        super().__init__(bn_batches)
        self._decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.update_parameters = self._update  # type: ignore[method-assign]

    @torch.no_grad()
    def _update(self, model: nn.Module) -> None:
        """One step of the average. PyTorch's own asks the device how many there were, and waits for the answer."""
        average: Any = self._average_model
        averages: list[Tensor] = list(average.module.parameters())
        current: list[Tensor] = list(model.parameters())
        if self.started:
            n = self._updates = self._updates + 1
            torch._foreach_lerp_(averages, current, 1 - min(self._decay, (1 + n) / (10 + n)))
        else:
            torch._foreach_copy_(averages, current)
        for mine, its in zip(average.module.buffers(), model.buffers(), strict=True):
            mine.copy_(its)
        average.n_averaged += 1

    _updates = 0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._updates = state_dict["updates"]


class Swa(_Average):
    """Stochastic weight averaging: the plain mean of the weights at the ends of the last epochs (Izmailov et al. 2018).

    Of the run as max_epochs and max_steps end it; under max_time of the steps of its last part. Where fewer than two
    epochs end in the last part, the steps of it are averaged instead.

    start: share of the run after which averaging begins, in [0, 1); bn_batches: as for `Ema`.
    Raises ValueError for a start outside [0, 1), InputError for a run of which nobody knows the end.
    """

    def __init__(self, *, start: float = 0.75, bn_batches: int = 0) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start must be in [0, 1), got {start}")
        super().__init__(bn_batches)
        self._start = start
        self._first_epoch = self._first_step = math.inf
        self._timer: Timer | None = None
        self._in_time = False  # whether max_time is running out

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the average, also where a run that had come to its end trains no more."""
        steps, epochs = _length(trainer)
        self._first_epoch = self._first_step = math.inf
        self._unit, self._begins = _Average._unit, f"after {self._start:.0%} of max_time"
        first = int(self._start * epochs) if epochs < math.inf else math.inf
        if epochs < math.inf and (int(epochs) - first >= 2 or steps == math.inf):
            self._first_epoch, self._begins = first, f"in epoch {first + 1}"
            self._unit = ("end of an epoch", "ends of epochs")
        elif steps < math.inf:
            self._first_step = int(self._start * steps)
            self._begins = f"at step {self._first_step + 1}"
        self._timer = next((c for c in trainer.callbacks if isinstance(c, Timer) and c._duration), None)  # type: ignore
        if self._timer is None and math.inf == self._first_epoch == self._first_step:
            raise InputError("averaging=swa averages the end of a run, and this one has none: give max_epochs")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timer is not None and self.started:
            self._in_time = self._late(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Validation runs before Lightning's own epoch-end hook: the epoch's weights are added after its last batch.
        if self._timer is not None and not self._in_time and not self.started and self._late(trainer):
            self._in_time, self._unit = True, _Average._unit
        ends = trainer.is_last_batch and trainer.current_epoch >= self._first_epoch
        if ends or self._in_time or trainer.global_step > self._first_step:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _late(self, trainer: Trainer) -> bool:
        """Whether `start` of the time is over; all processes decide alike."""
        timer: Any = self._timer
        return trainer.strategy.broadcast(timer.time_elapsed() >= self._start * timer._duration)


def _length(trainer: Any) -> tuple[float, float]:
    """Optimizer steps and epochs of a run, the last one in part; infinite where nobody knows them."""
    steps, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    steps = steps if steps > 0 else math.inf
    if steps < math.inf and batches < math.inf:
        return steps, steps / math.ceil(batches / trainer.accumulate_grad_batches)
    return steps, trainer.max_epochs if (trainer.max_epochs or -1) > 0 and steps == math.inf else math.inf


class Soup(Callback):
    """Model soup: the mean of the weights of the k best epochs of a run (Wortsman et al. 2022, uniform soup).

    k: checkpoints; monitor: a validation metric; mode: "min" or "max"; bn_batches: as for `Ema`.
    Raises ValueError for k < 2 or an unknown mode.
    """

    members = 1
    count = 0  # checkpoints in the mean that the module ends with

    def __init__(self, *, k: int = 3, monitor: str = "val/loss", mode: str = "min", bn_batches: int = 0) -> None:
        if k < 2:
            raise ValueError(f"k must be at least 2 checkpoints, got {k}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {mode}")
        self.k, self.monitor, self.sign, self._bn_batches = k, monitor, 1 if mode == "min" else -1, bn_batches
        self._kept: list[tuple[float, str]] = []  # (score, name of a file in the run's checkpoints), the best first

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        folder = _checkpoints(trainer)
        score = self.sign * float(logged(trainer, self.monitor))
        if len(self._kept) == self.k and score >= self._kept[-1][0]:
            return
        name = f"soup_{trainer.global_step}.pt"
        write(pl_module.state_dict(), folder / name)
        self._kept = sorted([*self._kept, (score, name)])[: self.k]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on from its best checkpoint, say, may have dropped files of that time since."""
        folder = _checkpoints(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        missing = [name for _, name in self._kept if not (folder / name).is_file()]
        if missing and trainer.is_global_zero:
            print(f"knep: averaging=soup goes on without {', '.join(missing)}, missing in {folder}", file=sys.stderr)
        self._kept = [(score, name) for score, name in self._kept if name not in missing]

    def after_save(self, trainer: Trainer) -> None:
        """Removes the files of worse epochs: not before the checkpoint that goes on without them is on disk."""
        if trainer.is_global_zero:
            kept = {name for _, name in self._kept}
            for path in _checkpoints(trainer).glob("soup_*.pt"):
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after_save(trainer)
        states = [read(_checkpoints(trainer) / name) for _, name in self._kept]
        if states:
            mean = {
                key: torch.stack([s[key].double() for s in states]).mean(0).to(first.dtype)
                for key, first in states[0].items()
            }
            pl_module.load_state_dict(mean)
            reestimate(trainer, pl_module, self._bn_batches)
        self.count = len(states)
        if self.count < 2:
            tell(trainer, f"averaging: {self.said}")

    @property
    def said(self) -> str:
        """What was averaged, in words."""
        if not self.count:
            return "nothing: training ended before its first validation"
        return f"{self.count} checkpoints" if self.count > 1 else "1 checkpoint, so nothing"

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [[score, name] for score, name in self._kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the names of files alone, which lie in this run's checkpoints wherever the run was before."""
        self._kept = [(score, Path(path).name) for score, path in state_dict["kept"]]

    def files(self, state_dict: Mapping[str, Any]) -> list[str]:
        """The names of the files that a state, one that was looked at, needs beside its checkpoint."""
        return [Path(path).name for _, path in state_dict["kept"]]


def _checkpoints(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"


def soup_step(name: str) -> str | None:
    """The step, in digits, of a file of `Soup`; None for any other name. Older runs name theirs by its whole path."""
    found = re.fullmatch(r"(/(?:[^/\0\n]+/)*checkpoints/)?soup_(\d{1,15})\.pt", name)
    return found[2] if found and ".." not in name.split("/") else None


class Ensemble(Callback):
    """Deep ensemble: `members` models from different seeds, whose class probabilities are averaged.

    Lakshminarayanan et al. 2017, sec. 2.4. Each member is trained by a fit of its own with seeds seed, seed + 1, ...

    members: models, at least 2. Raises ValueError for fewer.
    """

    def __init__(self, *, members: int = 3) -> None:
        if members < 2:
            raise ValueError(f"members must be at least 2 models, got {members}")
        self.members = members

"""`averaging`: which weights are validated, saved as best and tested. A callback `f(**hp)`; acts after each step.

Every callback here has `members`: how many independent models one run trains (1 for all but `Ensemble`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from knep.checkpoint import write
from knep.hardware import at_precision

__all__ = ["Ema", "Ensemble", "Soup", "Swa", "none"]


class _Single(Callback):
    members = 1


def none() -> Callback:
    """The weights of the last step are used as they are."""
    return _Single()


def _reestimate(trainer: Trainer, module: Any, batches: int) -> None:
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
    """Validates, saves and ends with the average once there is one; until then with the current weights."""

    members = 1

    def __init__(self, bn_batches: int, **kwargs: Any) -> None:
        if bn_batches < 0:
            raise ValueError(f"bn_batches must be 0 (all) or positive, got {bn_batches}")
        super().__init__(use_buffers=False, **kwargs)
        self._bn_batches = bn_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        at_precision(trainer, pl_module)
        super().setup(trainer, pl_module, stage)

    @property
    def started(self) -> bool:
        return self._latest_update_step > 0

    def _swaps(self, trainer: Trainer) -> bool:
        """Within a fit; after it the module holds the weights that were chosen, which `validate` must not exchange."""
        return trainer.state.fn == "fit" and self._average_model is not None and self.started

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swaps(trainer):
            self._swap_models(pl_module)
            _reestimate(trainer, pl_module, self._bn_batches)

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
        if self.started:
            super().on_train_end(trainer, pl_module)
            _reestimate(trainer, pl_module, self._bn_batches)


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

    start: share of the epochs after which averaging begins, in [0, 1); bn_batches: as for `Ema`.
    Raises ValueError for a start outside [0, 1).
    """

    def __init__(self, *, start: float = 0.75, bn_batches: int = 0) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start must be in [0, 1), got {start}")
        super().__init__(bn_batches)
        self._start = start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Validation runs before Lightning's own epoch-end hook: the epoch's weights are added after its last batch.
        epochs = trainer.max_epochs or 1
        if trainer.is_last_batch and trainer.current_epoch >= int(self._start * epochs):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class Soup(Callback):
    """Model soup: the mean of the weights of the k best epochs of a run (Wortsman et al. 2022, uniform soup).

    k: checkpoints; monitor: a validation metric; mode: "min" or "max"; bn_batches: as for `Ema`.
    Raises ValueError for k < 2 or an unknown mode.
    """

    members = 1

    def __init__(self, *, k: int = 3, monitor: str = "val/loss", mode: str = "min", bn_batches: int = 0) -> None:
        if k < 2:
            raise ValueError(f"k must be at least 2 checkpoints, got {k}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {mode}")
        self._k, self._monitor, self._sign, self._bn_batches = k, monitor, 1 if mode == "min" else -1, bn_batches
        self._kept: list[tuple[float, str]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        score = self._sign * float(trainer.callback_metrics[self._monitor])
        if len(self._kept) == self._k and score >= self._kept[-1][0]:
            return
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"soup_{trainer.global_step}.pt"
        write(pl_module.state_dict(), path)
        self._kept = sorted([*self._kept, (score, str(path))])[: self._k]

    def after_save(self, trainer: Trainer) -> None:
        """Removes the files of worse epochs: not before the checkpoint that goes on without them is on disk."""
        if trainer.is_global_zero:
            kept = {Path(path).name for _, path in self._kept}
            for path in (Path(trainer.default_root_dir) / "checkpoints").glob("soup_*.pt"):
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (Path(trainer.default_root_dir) / "checkpoints").mkdir(parents=True, exist_ok=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after_save(trainer)
        states = [torch.load(path, map_location="cpu", weights_only=True) for _, path in self._kept]
        if states:
            mean = {
                key: torch.stack([s[key].double() for s in states]).mean(0).to(first.dtype)
                for key, first in states[0].items()
            }
            pl_module.load_state_dict(mean)
            _reestimate(trainer, pl_module, self._bn_batches)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [[score, path] for score, path in self._kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = [(score, path) for score, path in state_dict["kept"]]


class Ensemble(Callback):
    """Deep ensemble: `members` models from different seeds, whose class probabilities are averaged.

    Lakshminarayanan et al. 2017, sec. 2.4. Each member is trained by a fit of its own with seeds seed, seed + 1, ...

    members: models, at least 2. Raises ValueError for fewer.
    """

    def __init__(self, *, members: int = 3) -> None:
        if members < 2:
            raise ValueError(f"members must be at least 2 models, got {members}")
        self.members = members

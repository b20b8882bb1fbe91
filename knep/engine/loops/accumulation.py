"""Accumulation: the gradient of an optimizer step is the mean over all images of its window of micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import BType, extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from knep.errors import InputError
from knep.optim.gradients import gradients, scale_
from knep.utils.batch_plan import accumulates

# Below this a scale is the rounding of a full window's, whose gradients stay as they are to the bit.
_ROUNDING = 1e-9


def scale_of(batches: int, typical: float, images: float) -> float:
    """The factor on the gradients of a window of `images` images, summed with the weights of `Window.weight`.

    Exactly 1 for a full window of `batches` micro-batches of `typical` images.
    """
    scale = batches * typical / images
    return 1.0 if abs(scale - 1) < _ROUNDING else scale


class Window:
    """The window under way in one fit.

    A loop divides the loss of each micro-batch by `batches`, the length of a full window: it cannot know that the last
    window of an epoch is shorter, nor how many images are still to come. So each loss is weighted by its images over
    those of a `typical` micro-batch, and the gradients are scaled once, at the window's end.

    typical: images, None for those of the first batch; images: of the window so far; uneven: whether the micro-batches
    of one time differ in size from process to process, which costs one sum over them a step.
    """

    def __init__(self, trainer: Trainer, kept: dict[str, Any] | None = None) -> None:
        kept = kept or {}
        self._strategy, self._world = trainer.strategy, trainer.world_size
        self._trainer = trainer
        self.typical: float | None = getattr(trainer.train_dataloader, "mean_batch", None) or kept.get("typical")
        self.images: float = kept.get("images", 0)
        self.uneven = uneven(trainer)

    @property
    def batches(self) -> int:
        """Micro-batches of a full window, which may be more in a later epoch."""
        return self._trainer.accumulate_grad_batches

    def add(self, images: int, batch_idx: int) -> None:
        """Counts a micro-batch of this place in the epoch, before its pass."""
        if self.typical is None:
            self.typical = float(self._strategy.broadcast(images))
        position = batch_idx % self.batches
        before = (self.images or position * self.typical) if position else 0  # older checkpoints have no count
        self.images = before + images

    def weight(self, images: int) -> float:
        """Of the loss of a micro-batch, a mean over its images, in the window's sum."""
        return images / self.typical if self.typical else 1.0

    def scale(self, device: torch.device) -> float | Tensor:
        """The factor on the gradients of a window that has come to its end; a 0-dim tensor where processes differ."""
        assert self.typical is not None
        if not self.uneven:
            return scale_of(self.batches, self.typical, self.images)
        images = self._strategy.reduce(torch.tensor(float(self.images), device=device), reduce_op="sum")
        return self.batches * self.typical * self._world / images

    def state_dict(self) -> dict[str, Any]:
        return {"typical": self.typical, "images": self.images}


def accumulate(trainer: Trainer, wanted: int | str | Mapping[int, int]) -> None:
    """Has the Trainer step every `wanted` micro-batches, or once an "epoch", as the recipe says; before the fit.

    Raises InputError where the Trainer was given another number.
    """
    if wanted == 1:
        return
    if isinstance(wanted, Mapping):
        raise InputError(
            f"accumulate={dict(wanted)} of the recipe is for knep's own runs: give the Trainer "
            f"callbacks=[GradientAccumulationScheduler({dict(wanted)})], and load the recipe with accumulate=1"
        )
    if wanted == "epoch":
        trainer.fit_loop.setup_data()
        if trainer.num_training_batches == math.inf:
            raise InputError(
                "optimizer.accumulate=epoch (optimizer=gd) takes a step an epoch, and the training loader does not say "
                "how long one is: give the Trainer limit_train_batches=N, or choose another optimizer, such as sgd"
            )
        wanted = int(trainer.num_training_batches)
    if trainer.accumulate_grad_batches not in (1, wanted):
        raise InputError(
            f"accumulate={wanted} of the recipe contradicts Trainer(accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}): leave one of them out"
        )
    trainer.accumulate_grad_batches = int(wanted)


def uneven(trainer: Trainer) -> bool:
    """Whether processes may get micro-batches of different sizes: not from knep's loaders or a DistributedSampler."""
    loader = trainer.train_dataloader
    shared = hasattr(loader, "mean_batch") or isinstance(getattr(loader, "sampler", None), DistributedSampler)
    return trainer.world_size > 1 and not shared


def window_of(trainer: Trainer, kept: dict[str, Any] | None = None) -> Window | None:
    """The window of a fit that accumulates or whose processes differ; None where a step is the mean by itself.

    kept: the `state_dict` of an earlier life of the run.
    """
    return Window(trainer, kept) if accumulates(trainer) or uneven(trainer) else None


def inside_window(trainer: Trainer) -> bool:
    """Whether the micro-batch of now is not the last of its window. Lightning has no public word for it."""
    return trainer.fit_loop._should_accumulate()


def _rows(batch: object) -> int:
    """The rows of a batch, or its graphs. Raises InputError where it does not say how many."""
    try:
        graphs = getattr(batch, "num_graphs", None)
        return graphs if isinstance(graphs, int) else extract_batch_size(batch)  # pyright: ignore[reportArgumentType]
    except MisconfigurationException:  # an object, not a container of tensors
        if isinstance(batch, Sized) and len(batch) > 0:
            return len(batch)
        raise InputError(
            f"accumulation weighs each batch by its rows, and a {type(batch).__name__} does not say how many it has: "
            "give it __len__, or load the recipe with accumulate=1"
        ) from None


class MeanOverWindow(Callback):
    """The same for a LightningModule of any project, whose loss is the mean over its batch.

    Its losses cannot be weighted: the sum of gradients so far is brought to the unit of each new micro-batch instead.
    """

    def __init__(self) -> None:
        self._last, self._images = 0, 0  # of the last micro-batch, and of the window so far

    def _leaves(self, trainer: Trainer, module: LightningModule) -> bool:
        return trainer.accumulate_grad_batches == 1 or hasattr(module, "window_scale")  # a Classifier has a `Window`

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: BType, batch_idx: int) -> None:
        if self._leaves(trainer, pl_module):
            return
        images = _rows(batch)
        inside = batch_idx % trainer.accumulate_grad_batches > 0 and self._images > 0
        if inside and images != self._last:
            scale_(gradients(pl_module.parameters()), self._last / images)
        self._last, self._images = images, images + (self._images if inside else 0)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leaves(trainer, pl_module) or inside_window(trainer):
            return
        scale = scale_of(trainer.accumulate_grad_batches, self._last, self._images)
        if scale != 1:
            scale_(gradients(pl_module.parameters()), scale)

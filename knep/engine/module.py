"""The LightningModule: it takes the steps of `engine.step` in Lightning's loops, counts them and logs what they show.

The guard looks at each step before it counts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import LRSchedulerConfig, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn
from torchmetrics import MetricCollection

from knep.engine.logging.step_metrics import Dynamics
from knep.engine.loops.accumulation import Window, inside_window, window_of
from knep.engine.loops.run_length import run_length
from knep.engine.schedule_free import Average, average_of
from knep.engine.step import Step
from knep.errors import InputError
from knep.guard.deferred import sentry_of
from knep.guard.policy import Guard
from knep.guard.step_guard import BadStep, Sentry
from knep.optim.gradients import gradients
from knep.optim.param_groups import decayed, rate
from knep.optim.thawing import Tuning
from knep.surgery.record import mode
from knep.tasks.base import Batch, Counted, Sums, Task
from knep.tasks.classification import Classification
from knep.tasks.metrics import numbers
from knep.utils.hardware import at_precision
from knep.utils.monitors import logged
from knep.utils.rng import mix, reseed

if TYPE_CHECKING:
    from knep.recipes.recipe import Recipe, Report


def _sane(x: Tensor) -> Tensor:
    """The rows of finite numbers alone: the guard kept the others from training too."""
    return x[x.flatten(1).isfinite().all(1)] if x.is_floating_point() else x


class Classifier(L.LightningModule):
    """Trains `model` on (x, y) batches as `recipe` says; any DataLoader or datamodule will do.

    x: raw images (N, C, H, W), uint8 or float, or other rows; y: what the task asks for.
    Logged once an epoch: {train,val,test}/loss, acc where the task counts it, and {val,test}/ the task's metrics; every
    `log_every` optimizer steps: lr, gradient norms.

    task: what is learned; without one, one class of num_classes, by y int64 (N,), -1 marking padding.
    scaling: maps raw pixels to the model's input;
    seed: every random draw of a step is a function of it, the rank and the step's position;
    channels_last: images reach the model in this memory format, which convolutions of most hardware prefer;
    guard: what is done about steps that are not finite; None stops at them;
    tuning: of weights that were loaded, as `Recipe.tuning` gives it; said: lines on how the model was made.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        num_classes: int | None = None,
        task: Task | None = None,
        scaling: nn.Module | None = None,
        seed: int = 0,
        log_every: int = 10,
        channels_last: bool = False,
        about: dict[str, Any] | None = None,
        guard: Guard | None = None,
        tuning: Tuning | None = None,
        said: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.scaling = scaling if scaling is not None else nn.Identity()
        self.augment: Any = recipe.augment
        self.recipe = recipe
        self.seed = seed
        self.log_every = log_every
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.about = about or {}  # plain data that travels in the checkpoint: config, class names
        self.guard = guard if guard is not None else Guard()
        self.sentry: Sentry | None = None  # while training
        self.tuning, self.said = tuning, list(said)
        self.report: Report | None = None  # of what the recipe did to the model, where a config built both
        if task is None:
            if num_classes is None:
                raise InputError("the module needs a task: give task=..., or num_classes for one class of several")
            task = Classification(num_classes, recipe.regularization.label_smoothing)
        self.task = task
        self._measures = task.metrics() is not None
        self.num_classes = task.outputs
        self.step = Step(
            self, model, self.task, augment=self.augment, clip=recipe.clip, regularization=recipe.regularization
        )
        self._sums: dict[str, Sums] = {}
        self._spare: dict[str, Sums] = {}
        self._metrics: dict[str, MetricCollection] = {}
        self._met: list[Counted] = []  # passes that have not been judged yet
        self._window: Window | None = None  # while training by windows of micro-batches
        self.window_scale = 1.0  # on the gradients of the last pass
        self.dynamics = Dynamics()
        self._resumed: dict[str, Any] = {}
        self._resumed_weights: dict[str, Tensor] | None = None
        self._average: Average | None = None  # while training, of an optimizer that is evaluated elsewhere

    def setup(self, stage: str) -> None:
        at_precision(self.trainer, self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.model(self.scaling(x_NCHW).to(memory_format=self.layout))

    def tune(self, epoch: int) -> None:
        """Freezes and thaws the model for an epoch, as `finetune` says."""
        if self.tuning is not None:
            self.tuning.at(self.model, epoch)
            self.step.decayed = self.tuning.trained(decayed(self.model))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.tuning is not None:
            self.tuning.keep_norms()
        reseed(self.step_seed(batch_idx), self.device)
        if self._window is not None:
            self._window.add(batch[0].shape[0], batch_idx)
        if self.sentry is not None:
            self.sentry.before_batch(batch, batch_idx)

    def step_seed(self, batch_idx: int) -> int:
        """What the draws of a batch of this epoch follow from."""
        return mix(self.seed, self.global_rank, self.current_epoch, batch_idx) >> 1

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        sentry = self.sentry
        if sentry is None:
            found = self.step.loss(batch, self.weight(batch[0].shape[0]))
            self._add("train", found.counted)
            return found.total
        sentry.before_pass()
        found = self.step.loss(batch, self.weight(batch[0].shape[0]))
        self._met.append(found.counted)
        sentry.after_pass(found.total)
        return found.total

    def validation_step(self, batch: Batch, batch_idx: int, split: str = "val") -> None:
        x, target = self.task.split(batch)
        output = self(x)
        if not self.step.checked:
            self.step.check(output, target)
        self._add(split, self.task.evaluated(output, target))
        if self._measures:
            self._measure(split, *self.task.answers(output, target))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx, split="test")

    def on_train_start(self) -> None:
        if self._resumed and self.global_rank == 0:  # the sums of all processes were added up when they were saved
            for split, values in self._resumed["sums"].items():
                self._sums[split] = Sums(self.device)
                self._sums[split].go_on(values)
            self.dynamics.load_state_dict(self._resumed)
        if self.tuning is not None:
            self.tuning.shared = self.trainer.world_size > 1
        self.tune(self.current_epoch)  # a run resumed inside an epoch has no start of it
        self._average = average_of(self)
        if self._average is not None:
            self._average.begin(self._resumed_weights)
        self._resumed_weights = None
        for config in self._plateaus():
            config.interval = "validation"  # none of the trainer's, which steps at each epoch's end, validated or not
        self.augment.epoch = self.current_epoch  # a run resumed inside an epoch has no start of it
        self._window = window_of(self.trainer, self._resumed.get("window"))
        if self.guard.action != "none":
            self.sentry = sentry_of(self.guard, self, self._resumed.get("guard"))

    def on_train_epoch_start(self) -> None:
        self.tune(self.current_epoch)
        self.augment.epoch = self.current_epoch
        self._window = window_of(self.trainer)

    def on_validation_start(self) -> None:
        self._settle()
        self.dynamics.write(self.loggers)
        if self._average is not None:
            self._average.enter()

    def on_validation_end(self) -> None:
        if self._average is not None:
            self._average.leave()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            for config in self._plateaus():
                self.lr_scheduler_step(config.scheduler, logged(self.trainer, str(config.monitor)))

    def _plateaus(self) -> list[LRSchedulerConfig]:
        """The schedules that follow a validation metric."""
        configs = self.trainer.lr_scheduler_configs
        return [c for c in configs if c.reduce_on_plateau and str(c.monitor).startswith("val/")]

    def on_train_end(self) -> None:
        self.sentry = None
        self.dynamics.write(self.loggers)
        if self._average is not None:
            self._average.enter()
            self._average = None

    def _settle(self) -> None:
        """Nothing is evaluated or saved before the last step is judged."""
        if self.sentry is not None:
            self.sentry.settle()

    def on_train_epoch_end(self) -> None:
        self._settle()
        self.dynamics.write(self.loggers)
        self._log_sums("train")

    def on_validation_epoch_end(self) -> None:
        self._log_sums("val")

    def on_test_epoch_end(self) -> None:
        self._log_sums("test")

    def estimate_statistics(self, trainer: L.Trainer, batches: int) -> None:
        """Batch-norm statistics of the present weights from so many batches of training images, all for 0."""
        read = getattr(getattr(trainer, "datamodule", None), "train_images", None)
        images = read() if read else (x for x, *_ in trainer.train_dataloader)  # type: ignore[union-attr]
        used = (_sane(x).to(self.device) for i, x in enumerate(images) if not batches or i < batches)
        scaled = (self.scaling(x).to(next(self.model.parameters()).dtype) for x in used)
        mode = self.model.training
        with torch.no_grad(), contextlib.nullcontext() if self.tuning is None else self.tuning.statistics_kept():
            update_bn(scaled, self.model)
        self.model.train(mode)
        if self.tuning is not None:
            self.tuning.keep_norms()

    @torch.no_grad()
    def validation_loss(self, trainer: L.Trainer) -> float:
        """Mean loss of the present weights over the validation split, on the batches that the trainer takes of it."""
        data, limits = getattr(trainer, "datamodule", None), trainer.num_val_batches
        loader: Any = data.val_dataloader() if data is not None else trainer.val_dataloaders
        limit, sums = limits[0] if isinstance(limits, list) else limits, Sums(self.device)
        with mode(self.model, False), trainer.precision_plugin.val_step_context():
            for i, batch in enumerate(loader):
                if i >= limit:
                    break
                x, target = self.task.split(trainer.strategy.batch_to_device(batch, self.device))
                sums.add(self.task.evaluated(self(x), target))
        loss, _, rows = sums.values().tolist()
        return loss / rows if rows else math.nan

    def weight(self, images: int) -> float:
        """Of the loss of a micro-batch, as `engine.loops.accumulation.Window` says; 1 where each batch is a step."""
        return 1.0 if self._window is None else self._window.weight(images)

    def _add(self, split: str, counted: Counted) -> None:
        if split not in self._sums:
            self._sums[split] = self._spare.pop(split, None) or Sums(self.device)
        self._sums[split].add(counted)

    def _measure(self, split: str, predictions: Tensor, target: Tensor) -> None:
        if split not in self._metrics:
            made = self.task.metrics()
            assert made is not None
            self._metrics[split] = made.to(self.device)
        if len(target):
            self._metrics[split].update(predictions, target)

    def shown(self, split: str) -> dict[str, float]:
        """What is known of the epoch so far, for a line or a bar."""
        loss, acc = self.running(split)
        return {"loss": loss} | ({"acc": acc} if self.task.counts_right else {})

    def running(self, split: str) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far, NaN where nothing counted; waits for the device."""
        loss, correct, images = self._sums[split].values().tolist() if split in self._sums else (0.0, 0.0, 0.0)
        return (loss / images, correct / images) if images else (math.nan, math.nan)

    def _log_sums(self, split: str) -> None:
        own = self._spare[split] = self._sums.pop(split, None) or Sums(self.device)
        sums = self.trainer.strategy.reduce(own.values(), reduce_op="sum")
        own.reset()
        if not sums[2]:
            return  # the guard dropped each step of the epoch
        found = {f"{split}/loss": (sums[0] / sums[2]).float()}
        if self.task.counts_right:
            found[f"{split}/acc"] = (sums[1] / sums[2]).float()
        metrics = self._metrics.get(split)
        if metrics is not None:
            found |= {f"{split}/{name}": value for name, value in numbers(metrics.compute()).items()}
            metrics.reset()
        self.log_dict(found, sync_dist=False, rank_zero_only=False)

    def make_optimizer(self) -> Optimizer:
        """The recipe's, over all parameters that are trained in any epoch."""
        return self.recipe.optimizer(self.model, tuning=self.tuning)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer()
        self.step.parameters = list(self.model.parameters())  # a strategy may have exchanged them
        total, per_epoch = run_length(self.trainer, self.recipe)
        scheduler = self.recipe.scheduler(optimizer, total_steps=total, steps_per_epoch=per_epoch)
        found = {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.recipe.schedule_at}}
        return cast("OptimizerLRSchedulerConfig", found)

    def on_after_backward(self) -> None:
        if self._window is None:
            return
        self.window_scale = 1.0
        if not inside_window(self.trainer):
            self._scale(self._window.scale(self.device))
        elif self.sentry is not None:  # the last micro-batch of a window is judged with the whole gradient
            self._count(self.sentry.after_micro_batch())

    def _scale(self, factor: float | Tensor) -> None:
        self.step.scale(factor)
        self.window_scale = 1.0 if self.sentry is None else float(factor)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.tuning is not None:
            self.tuning.drop()
        if gradient_clip_val is not None and not self.step.clips:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        # SAM clips twice in a step: once is enough in the log.
        logged = self.global_step % self.log_every == 0 and self.dynamics.last_step != self.global_step
        if not (self.step.clips or logged):
            if self.sentry is not None:
                self.sentry.judge(None)
            return
        parameters, before = self.step.clip()
        if self.sentry is not None:
            self.sentry.judge(before)
        if logged:
            after = nn.utils.get_total_norm(gradients(parameters)) if self.step.clips else before
            self.dynamics.add(self.global_step, rate(optimizer), before, after)
            if self.dynamics.due:
                self.dynamics.write(self.loggers)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        self.step.clear()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        sentry = self.sentry
        own = cast("Optimizer", optimizer)  # Lightning's wrapper has all that its optimizer has
        if sentry is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.step.after(own)
            return
        rates = sentry.begin(own)
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.step.after(own)
            sentry.after_step()
        except BadStep as bad:
            self._count(False)
            sentry.answer(bad)
        else:
            self._count(True)
        finally:
            sentry.end(own, rates)

    def _count(self, good: bool) -> None:
        """Adds the passes since the last judgement to the epoch's sums where they were good."""
        for met in self._met if good else ():
            self._add("train", met)
        self._met.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._settle()
        self.dynamics.write(self.loggers)  # a resumed run goes on behind the points of this one
        checkpoint["knep"] = self.about
        checkpoint["running"] = {
            "sums": {k: self.trainer.strategy.reduce(s.values(), reduce_op="sum") for k, s in self._sums.items()},
            **self.dynamics.state_dict(),
        }
        if self._window is not None:
            checkpoint["running"]["window"] = self._window.state_dict()
        if self.sentry is not None:
            checkpoint["running"]["guard"] = self.sentry.state_dict(self._scheduled(checkpoint))
        if self._average is not None:
            self._average.save(checkpoint)

    def _scheduled(self, checkpoint: dict[str, Any]) -> bool:
        """Whether a run that no signal interrupts saves this checkpoint too."""
        asked = any(getattr(c, "asked", 0) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        every = (self.about.get("config") or {}).get("checkpoint", {}).get("every")
        on_time = isinstance(every, int) and self.global_step % every == 0
        return not asked or on_time or checkpoint.get("exact", {}).get("place") == "epoch"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint.get("running", {})
        self._resumed_weights = checkpoint.get("current_model_state")
        if self._resumed.get("guard"):
            self.guard.load_state_dict(self._resumed["guard"])  # which a run that had trained to its end reports too

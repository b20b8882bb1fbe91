"""The LightningModule: it takes the steps of `engine.step` in Lightning's loops, counts them and logs what they show.

The guard looks at each step before it counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from knep.engine.logging.step_metrics import Dynamics
from knep.engine.loops.accumulation import Window, window_of
from knep.engine.schedule_free import Average, average_of
from knep.engine.step import Step, rate
from knep.errors import InputError
from knep.guard.deferred import sentry_of
from knep.guard.policy import Guard
from knep.guard.step_guard import BadStep, Sentry
from knep.optim.gradients import gradients
from knep.optim.schedules import Unchanged
from knep.tasks.base import Batch, Counted, Sums
from knep.tasks.classification import Classification
from knep.utils.hardware import at_precision
from knep.utils.monitors import logged
from knep.utils.rng import mix, reseed

if TYPE_CHECKING:
    from knep.recipes.recipe import Recipe


def _placeholder() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(())], lr=1.0)


class Classifier(L.LightningModule):
    """Trains `model` on (x, y) batches as `recipe` says; any DataLoader or datamodule will do.

    x: raw images (N, C, H, W), uint8 or float; y: int64 (N,), -1 marks padding, which no metric counts.
    Logged once an epoch: {train,val,test}/{loss,acc}; every `log_every` optimizer steps: lr, gradient norms.

    scaling: maps raw pixels to the model's input; num_classes: width of the logits;
    seed: every random draw of a step is a function of it, the rank and the step's position;
    channels_last: images reach the model in this memory format, which convolutions of most hardware prefer;
    guard: what is done about steps that are not finite; None stops at them.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        num_classes: int,
        scaling: nn.Module | None = None,
        seed: int = 0,
        log_every: int = 10,
        channels_last: bool = False,
        about: dict[str, Any] | None = None,
        guard: Guard | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.scaling = scaling if scaling is not None else nn.Identity()
        self.augment: Any = recipe.augment
        self.recipe = recipe
        self.num_classes = num_classes
        self.seed = seed
        self.log_every = log_every
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.about = about or {}  # plain data that travels in the checkpoint: config, class names
        self.guard = guard if guard is not None else Guard()
        self.sentry: Sentry | None = None  # while training
        self.task = Classification(num_classes, recipe.regularization.label_smoothing)
        self.step = Step(
            self, model, self.task, augment=self.augment, clip=recipe.clip, regularization=recipe.regularization
        )
        self._sums: dict[str, Sums] = {}
        self._spare: dict[str, Sums] = {}
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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
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
        self._add(split, self.task.evaluated(self(x), target))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx, split="test")

    def on_train_start(self) -> None:
        if self._resumed and self.global_rank == 0:  # the sums of all processes were added up when they were saved
            for split, values in self._resumed["sums"].items():
                self._sums[split] = Sums(self.device)
                self._sums[split].go_on(values)
            self.dynamics.load_state_dict(self._resumed)
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

    def _plateaus(self) -> list[Any]:
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

    def weight(self, images: int) -> float:
        """Of the loss of a micro-batch, as `engine.loops.accumulation.Window` says; 1 where each batch is a step."""
        return 1.0 if self._window is None else self._window.weight(images)

    def _add(self, split: str, counted: Counted) -> None:
        if split not in self._sums:
            self._sums[split] = self._spare.pop(split, None) or Sums(self.device)
        self._sums[split].add(counted)

    def running(self, split: str) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far; waits for the device."""
        loss, correct, images = self._sums[split].values().tolist() if split in self._sums else (0.0, 0.0, 0.0)
        return loss / max(images, 1), correct / max(images, 1)

    def _log_sums(self, split: str) -> None:
        own = self._spare[split] = self._sums.pop(split)
        sums = self.trainer.strategy.reduce(own.values(), reduce_op="sum")
        own.reset()
        loss, acc = (sums[0] / sums[2]).float(), (sums[1] / sums[2]).float()
        self.log_dict({f"{split}/loss": loss, f"{split}/acc": acc}, sync_dist=False, rank_zero_only=False)

    def configure_optimizers(self) -> Any:
        optimizer = self.recipe.optimizer(self.model)
        self.step.parameters = list(self.model.parameters())  # a strategy may have exchanged them
        total, per_epoch = self._length()
        scheduler = self.recipe.scheduler(optimizer, total_steps=total, steps_per_epoch=per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.recipe.schedule_at}}

    def _length(self) -> tuple[int, int]:
        """Optimizer steps of the run and of an epoch. Raises InputError where a schedule needs what nobody knows."""
        trainer = self.trainer
        total = trainer.estimated_stepping_batches
        trainer.fit_loop.setup_data()  # the number of batches is unknown before it where only steps are limited
        batches = trainer.num_training_batches
        unknown = not 0 < total < math.inf, batches == math.inf
        if any(unknown) and not isinstance(self.recipe.scheduler(_placeholder(), 1, 1), (Unchanged, ReduceLROnPlateau)):
            raise InputError(
                "the schedule needs the length of the run, and the training loader does not say how many batches it "
                "has: give the Trainer limit_train_batches=N, or load the recipe with scheduler=none"
                if unknown[1]
                else "the schedule needs the length of the run: give the Trainer max_epochs or max_steps"
            )
        per_epoch = 1 if unknown[1] else max(1, -(-int(batches) // trainer.accumulate_grad_batches))
        return 1 if unknown[0] else int(total), per_epoch

    def on_after_backward(self) -> None:
        if self._window is None:
            return
        self.window_scale = 1.0
        if not self.trainer.fit_loop._should_accumulate():
            self._scale(self._window.scale(self.device))
        elif self.sentry is not None:  # the last micro-batch of a window is judged with the whole gradient
            self._count(self.sentry.after_micro_batch())

    def _scale(self, factor: float | Tensor) -> None:
        self.step.scale(factor)
        self.window_scale = 1.0 if self.sentry is None else float(factor)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
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

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.step.clear()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        sentry = self.sentry
        if sentry is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.step.after(optimizer)
            return
        rates = sentry.begin(optimizer)
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.step.after(optimizer)
            sentry.after_step()
        except BadStep as bad:
            self._count(False)
            sentry.answer(bad)
        else:
            self._count(True)
        finally:
            sentry.end(optimizer, rates)

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

"""The LightningModule: a model, a recipe and a loss. One step, and where each slot acts:

    batch -- augment -- scaling --> model[norm, activation, dropout] --> loss (+ regularization) --> backward
          -- clip --> optimizer -- regularization, scheduler --> averaging ... epoch end: validate --> stopping

`init` acts once, before; the test split is read once, after. The guard looks at each step before it counts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from knep.engine.logging.step_metrics import Dynamics
from knep.engine.loops.accumulation import Window, window_of
from knep.engine.schedule_free import Average, average_of
from knep.errors import InputError
from knep.guard.deferred import sentry_of
from knep.guard.policy import Guard
from knep.guard.step_guard import BadStep, Sentry
from knep.optim.gradients import gradients, scale_
from knep.optim.param_groups import decayed
from knep.optim.schedules import Unchanged
from knep.recipes import clip
from knep.recipes.regularization import Regularizer
from knep.utils.hardware import at_precision
from knep.utils.monitors import logged
from knep.utils.rng import mix, reseed

if TYPE_CHECKING:
    from knep.recipes.recipe import Recipe


def _rate(optimizer: Any) -> float:
    """The head's learning rate: the largest where layers decay towards the input."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _placeholder() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(())], lr=1.0)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the checks that Hydra repeats at each call of a target which it has checked when it made it."""
    if isinstance(function, functools.partial):
        return functools.partial(function.func, *function.args, **function.keywords)
    return function


class _Sums:
    """Loss, correct answers and images of an epoch so far, on the device; adding never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._loss, self._correct, self._seen = torch.zeros(3, dtype=torch.float64, device=device).unbind()
        self._images = 0

    def add(self, loss: Tensor, correct: Tensor, images: Tensor | int) -> None:
        self._loss += loss
        self._correct += correct
        if isinstance(images, int):
            self._images += images
        else:
            self._seen += images

    def values(self) -> Tensor:
        """The three sums, float64 (3,)."""
        return torch.stack([self._loss, self._correct, self._seen + self._images])

    @classmethod
    def of(cls, values: Tensor, device: torch.device) -> _Sums:
        """Goes on from the sums (3,) of an earlier life of the run."""
        sums = cls(device)
        sums._loss, sums._correct, sums._seen = values.to(device, copy=True).unbind()
        return sums


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
        self._sums: dict[str, _Sums] = {}
        self._met: list[tuple[Tensor, Tensor, int]] = []  # passes that have not been judged yet
        self._window: Window | None = None  # while training by windows of micro-batches
        self.window_scale = 1.0  # on the gradients of the last pass
        self.dynamics = Dynamics()
        self._decayed = decayed(model)
        self._clip = _plain(recipe.clip)
        self._clips = getattr(self._clip, "func", self._clip) is not clip.none
        self.edits = type(recipe.regularization).after_step is not Regularizer.after_step
        self._owners: list[Tensor] = list(model.parameters())
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

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        sentry = self.sentry
        if sentry is None:
            total, met = self.loss(batch, self.weight(batch[0].shape[0]))
            self._add("train", *met)
            return total
        sentry.before_pass()
        total, met = self.loss(batch, self.weight(batch[0].shape[0]))
        self._met.append(met)
        sentry.after_pass(total)
        return total

    def loss(self, batch: tuple[Tensor, Tensor], weight: float) -> tuple[Tensor, tuple[Tensor, Tensor, int]]:
        """The loss (0-dim) of a training batch, times `weight`; and its sums: loss, correct answers, images."""
        x, y = self.augment(*batch, self.num_classes)
        logits_NK = self(x)
        loss = F.cross_entropy(logits_NK, y, label_smoothing=self.recipe.regularization.label_smoothing)
        target_N = y if y.ndim == 1 else y.argmax(1)
        images = x.shape[0]
        with torch.no_grad():
            met = (loss * images, (logits_NK.argmax(1) == target_N).sum(), images)
        # Terms and factors that change nothing are left out: each would be a kernel forward and another backward.
        penalty = self.recipe.regularization.penalty(self._decayed)
        total = loss if isinstance(penalty, float) and not penalty else loss + penalty
        return (total if weight == 1 else total * weight), met

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, split: str = "val") -> None:
        x, y = batch
        logits_NK = self(x)
        loss = F.cross_entropy(logits_NK.double(), y, ignore_index=-1, reduction="sum")
        self._add(split, loss, (logits_NK.argmax(1) == y).sum(), (y >= 0).sum())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx, split="test")

    def on_train_start(self) -> None:
        if self._resumed and self.global_rank == 0:  # the sums of all processes were added up when they were saved
            self._sums = {split: _Sums.of(values, self.device) for split, values in self._resumed["sums"].items()}
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

    def _add(self, split: str, loss: Tensor, correct: Tensor, images: Tensor | int) -> None:
        if split not in self._sums:
            self._sums[split] = _Sums(self.device)
        self._sums[split].add(loss, correct, images)

    def running(self, split: str) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far; waits for the device."""
        loss, correct, images = self._sums[split].values().tolist() if split in self._sums else (0.0, 0.0, 0.0)
        return loss / max(images, 1), correct / max(images, 1)

    def _log_sums(self, split: str) -> None:
        sums = self.trainer.strategy.reduce(self._sums.pop(split).values(), reduce_op="sum")
        loss, acc = (sums[0] / sums[2]).float(), (sums[1] / sums[2]).float()
        self.log_dict({f"{split}/loss": loss, f"{split}/acc": acc}, sync_dist=False, rank_zero_only=False)

    def configure_optimizers(self) -> Any:
        optimizer = self.recipe.optimizer(self.model)
        self._owners = list(self.model.parameters())
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
        if isinstance(factor, Tensor) or factor != 1:
            scale_(gradients(self._owners), factor)
        self.window_scale = 1.0 if self.sentry is None else float(factor)

    def clip(self) -> tuple[list[Tensor], Tensor]:
        """Edits the gradients as the recipe says; returns their owners and the norm before, 0-dim."""
        parameters = [p for p in self._owners if p.grad is not None]
        return parameters, self._clip(parameters)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        # SAM clips twice in a step: once is enough in the log.
        logged = self.global_step % self.log_every == 0 and self.dynamics.last_step != self.global_step
        if not (self._clips or logged):
            if self.sentry is not None:
                self.sentry.judge(None)
            return
        parameters, before = self.clip()
        if self.sentry is not None:
            self.sentry.judge(before)
        if logged:
            after = nn.utils.get_total_norm(gradients(parameters)) if self._clips else before
            self.dynamics.add(self.global_step, _rate(optimizer), before, after)
            if self.dynamics.due:
                self.dynamics.write(self.loggers)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        for p in self._owners:  # what `optimizer.zero_grad` does, without its profiling
            p.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        sentry = self.sentry
        if sentry is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.after_optimizer(optimizer)
            return
        rates = sentry.begin(optimizer)
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.after_optimizer(optimizer)
            sentry.after_step()
        except BadStep as bad:
            self._count(False)
            sentry.answer(bad)
        else:
            self._count(True)
        finally:
            sentry.end(optimizer, rates)

    def after_optimizer(self, optimizer: Any) -> None:
        """What the recipe's regularization does to the weights after the optimizer's step."""
        if self.edits:
            with torch.no_grad():
                self.recipe.regularization.after_step(self._decayed, _rate(optimizer))

    def _count(self, good: bool) -> None:
        """Adds the passes since the last judgement to the epoch's sums where they were good."""
        for met in self._met if good else ():
            self._add("train", *met)
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

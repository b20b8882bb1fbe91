"""The callback by which a recipe acts in the fit of any LightningModule.

setup ......... takes the places of the module's methods below, in this fit alone
configure_model  norm, activation, dropout and init edit the network; scaling is fitted on training batches
configure_optimizers  the recipe's optimizer and schedule
on_after_batch_transfer  augment, on training batches
on_before_optimizer_step  gradient of the penalty, then clip: both on gradients that are unscaled
optimizer's post hook  max-norm and decoupled decay; under manual optimization, the schedule
on_train_epoch_start  finetune freezes and thaws
validation .... at the average, of averaging= or of a schedule-free optimizer
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from knep.engine.any_module.edits import Edits
from knep.engine.any_module.foreign import refuse_doubles
from knep.engine.any_module.optimizers import Optimizers
from knep.engine.any_module.part import Part, function_of, name_of, network
from knep.engine.any_module.steps import Steps
from knep.engine.loops.accumulation import accumulate
from knep.engine.module import Classifier
from knep.engine.schedule_free import Average, average_of
from knep.errors import InputError
from knep.optim.param_groups import decayed
from knep.recipes import optimizer
from knep.recipes.averaging import Soup, WeightAverage, tell
from knep.recipes.recipe import Recipe
from knep.tasks.batches import Reading

_COUNTS = ("steps", "gradients", "penalised", "edited", "augmented", "smoothed")


class RecipeCallback(Callback):
    """As `knep.callbacks` says. parts: one network, or several with a recipe each; see `Part`."""

    def __init__(
        self,
        parts: list[Part],
        *,
        sample: Any = None,
        forward: Callable[..., Any] | None = None,
        reading: Reading,
        num_classes: int | None = None,
    ) -> None:
        self.parts, self.said = parts, []
        self._hooks: list[Any] = []
        self._edits = Edits(parts, self._say, sample=sample, forward=forward, reading=reading)
        self._optimizers = Optimizers(parts, self._hooks, self._say)
        self._steps = Steps(parts, reading=reading, num_classes=num_classes)
        self._average: Average | None = None
        self._resumed: dict[str, Tensor] | None = None
        self._aside: dict[str, Any] = {}  # methods of the module's own __dict__ that stand aside while it fits
        self.averaging: Any = parts[0].recipe.averaging
        self._fits = True

    @property
    def recipe(self) -> Recipe:
        return self.parts[0].recipe

    # Before the first step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, Classifier):
            raise InputError(f"{name_of(pl_module)} trains by its own recipe: leave knep.callbacks out")
        averaging = self.averaging
        if isinstance(averaging, Soup):
            averaging.folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        self._edits.anew()
        if stage == "fit":
            for part in self.parts:
                part.anew()
            self._refuse(trainer, pl_module)
            accumulate(trainer, self.recipe.accumulate)
            if len(self.parts) > 1 and isinstance(averaging, (WeightAverage, Soup)):
                name = type(averaging).__name__.lower()
                self._say(
                    trainer, f"averaging={name} averages all parameters of {name_of(pl_module)}, not one network's"
                )
        resume = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._look_at(trainer, pl_module, checkpoint)
            resume(checkpoint)

        self._take(pl_module, "on_load_checkpoint", on_load_checkpoint)
        before = pl_module.configure_model

        def configure_model() -> None:
            pl_module.__dict__.pop("configure_model", None)  # an average calls the module's own once more
            if self._aside["configure_model"] is not None:
                object.__setattr__(pl_module, "configure_model", self._aside["configure_model"])
            if self._edits.missing(pl_module):  # made there, or in the module's own setup
                before()
                self._edits.edit(trainer, pl_module, stage)
            else:
                self._edits.edit(trainer, pl_module, stage)
                before()
            if stage == "fit" and isinstance(averaging, WeightAverage):
                averaging.begin(trainer, pl_module, stage)

        self._take(pl_module, "configure_model", configure_model)
        if stage == "fit":
            own = pl_module.configure_optimizers
            # Functions, not partials, of which an average's copy of the module would copy the arguments too.
            elsewhere = "configure_optimizers" in vars(pl_module)  # as LightningCLI does
            made = self._optimizers.configure
            self._take(pl_module, "configure_optimizers", lambda: made(trainer, pl_module, own, elsewhere))
            transfer = pl_module.on_after_batch_transfer

            def on_after_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
                batch = transfer(batch, dataloader_idx)
                return self._steps.augmented(batch) if trainer.training else batch

            if any(part.augments for part in self.parts):
                self._take(pl_module, "on_after_batch_transfer", on_after_batch_transfer)
            if any(part.schedules for part in self.parts) and is_overridden("optimizer_step", pl_module):
                self._say(
                    trainer, f"rates that {name_of(pl_module)}.optimizer_step sets win over the recipe's schedule"
                )
            if any(part.mixes for part in self.parts):
                self._take(pl_module, "training_step", self._steps.first_step(pl_module, pl_module.training_step))
            if any(part.clips for part in self.parts) and is_overridden("configure_gradient_clipping", pl_module):
                self._say(trainer, f"clip= acts in place of {name_of(pl_module)}.configure_gradient_clipping")
                self._take(pl_module, "configure_gradient_clipping", lambda *_, **__: None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)
        if not any(part.steps for part in self.parts):  # refused: the module is as it came
            self._edits.take_back(pl_module)
        self._edits.settle()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._edits.settle()

    def _release(self, module: LightningModule) -> None:
        for part in self.parts:
            net = network(module, part.path) if part.tuning is not None else None
            if part.tuning is not None and net is not None:
                part.tuning.release(net)
        for name, own in self._aside.items():
            module.__dict__.pop(name, None)
            if own is not None:
                object.__setattr__(module, name, own)
        for hook in self._hooks:
            hook.remove()
        self._aside = {}
        self._hooks.clear()

    def _take(self, module: LightningModule, name: str, function: Callable[..., Any]) -> None:
        self._aside[name] = module.__dict__.get(name)
        object.__setattr__(module, name, function)

    def _say(self, trainer: Trainer, line: str) -> None:
        self.said.append(line)
        tell(trainer, f"knep: {line}")

    def _refuse(self, trainer: Trainer, module: LightningModule) -> None:
        """What cannot act in this fit, each with the line to write."""
        refuse_doubles(trainer, self.averaging, any(part.schedules for part in self.parts))
        if trainer.gradient_clip_val and any(part.clips for part in self.parts):
            raise InputError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) and the recipe's clip would both clip: leave "
                "one out, gradient_clip_val or, with clip=none, the recipe's"
            )
        if not module.automatic_optimization:
            whole = self.recipe.accumulate == "epoch"  # as optimizer=gd does
            if trainer.accumulate_grad_batches > 1 or self.recipe.accumulate != 1:
                line = "load the recipe with another optimizer" if whole else "load the recipe with accumulate=1"
                raise InputError(f"{name_of(module)} optimizes by hand, and accumulates by hand: {line}")
            for part in self.parts:
                if function_of(part.recipe.make_optimizer) is optimizer.sam:
                    raise InputError(
                        f"optimizer=sam needs the loss twice in a step, and {name_of(module)} optimizes by hand: load "
                        "the recipe with another optimizer"
                    )
        if len(self.parts) > 1 and module.automatic_optimization:
            raise InputError(
                f"model= names {len(self.parts)} networks, and Lightning steps one optimizer by itself: set "
                "self.automatic_optimization = False and step each of self.optimizers(), or name one network"
            )

    def _look_at(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint, before any of it is loaded: whether this recipe made it."""
        self._edits.size_scalings(checkpoint.get("state_dict") or {})
        if trainer.state.fn != "fit":
            return
        kept = (checkpoint.get("callbacks") or {}).get(self.state_key)
        if kept is None:
            raise InputError(
                "ckpt_path is of a fit without knep.callbacks, whose optimizer and layers are others: load its weights "
                "with load_state_dict, and fit without ckpt_path"
            )
        for part, was in zip(self.parts, kept["choices"], strict=False):
            choices = part.choices
            for slot, now in {**dict.fromkeys(was), **choices}.items():
                if was.get(slot) != now:
                    raise InputError(
                        f"ckpt_path was trained with {slot}={was.get(slot)}, and the recipe says {slot}={now}"
                    )

    # Steps

    def _thaw(self, trainer: Trainer, module: LightningModule) -> None:
        for part in self.parts:
            if part.tuning is not None:
                net = self._edits.found(part, module)
                part.tuning.at(net, trainer.current_epoch)
                part.decayed = part.tuning.trained(decayed(net))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._thaw(trainer, pl_module)
        self._average = average_of(pl_module)
        if self._average is not None:
            self._average.begin(self._resumed)
        self._resumed = None
        self._hooks += self._edits.watch_input(pl_module)  # behind the average's copy, which would copy these too

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._thaw(trainer, pl_module)
        for part in self.parts:
            part.recipe.augment.epoch = trainer.current_epoch  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for part in self.parts:
            if part.tuning is not None:
                part.tuning.keep_norms()
        self._steps.begin()
        self._edits.see_input(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._steps.see_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        part = next((part for part in self.parts if part.optimizer is optimizer), self.parts[0])
        self._edits.refuse_unread(part)
        if part.tuning is not None:
            part.tuning.drop()
        self._steps.before_optimizer(pl_module, part, optimizer)

    # Evaluation, checkpoints

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None:
            self._average.enter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None:
            self._average.leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._optimizers.ended(trainer, pl_module)
        if self._average is not None:
            self._average.enter()
            self._average = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average is not None:
            self._average.save(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._fits = trainer.state.fn == "fit"
        if self._fits and "averaging_state" not in checkpoint:
            self._resumed = checkpoint.get("current_model_state")

    def state_dict(self) -> dict[str, Any]:
        return {
            "choices": [part.choices for part in self.parts],
            "parts": [
                {
                    **{key: getattr(part, key) for key in _COUNTS},
                    "clipped": float(part.clipped),
                    "rates": list(part.rates),
                    "scheduler": None if part.scheduler is None else part.scheduler.state_dict(),
                }
                for part in self.parts
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fits:
            return
        self._stored = state_dict["parts"]
        for part, kept in zip(self.parts, self._stored, strict=True):
            for key in _COUNTS:
                setattr(part, key, kept[key])
            part.clipped, part.rates = kept["clipped"], tuple(kept["rates"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part, kept in zip(self.parts, getattr(self, "_stored", None) or [], strict=False):
            if part.scheduler is not None and kept["scheduler"] is not None:
                part.scheduler.load_state_dict(kept["scheduler"])

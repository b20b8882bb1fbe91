"""Fitting members: a plain loop over epochs and batches, with the order, the draws and the counts of single runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision

from knep.config.schema import RunConfig
from knep.data.base import ImageData
from knep.data.loaders import MemoryLoader
from knep.engine.loops.accumulation import scale_of
from knep.engine.precision import lost_in_bf16, precision, wrong_in_bf16
from knep.engine.schedule_free import has_two_points
from knep.ensemble.member import Member
from knep.ensemble.rng_streams import Draws
from knep.ensemble.stacked_model import computes_the_same, fold, same_shape, stacked
from knep.ensemble.steps import InTurn, Together
from knep.ensemble.support import apart, folds
from knep.utils.batch_plan import plan_of
from knep.utils.hardware import fast_products, quick_checks
from knep.utils.memory import keep_freed_memory
from knep.utils.rng import mix


def fit(
    runs: Sequence[RunConfig], data: ImageData, together: bool | None = None, header: Sequence[str] = ()
) -> list[Member]:
    """Trains the members that `runs` describe on prepared `data`; they are settled, and not tested.

    together: one pass for all, or a pass for each; None takes what is faster; header: lines to print before the first
    step.
    """
    trainer = runs[0].trainer
    gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    members = [Member(run, data) for run in runs]
    plugin = _plugin(members[0], data, device)
    for member in members:
        plugin.convert_module(member.module.to(device))
    fast_products(trainer.deterministic)
    if not gpu and runs[0].runtime.keep_memory:
        keep_freed_memory()
    data.drop_last = members[0].module.recipe.accumulate != "epoch"
    with quick_checks():
        fitting = _Fit(members, data, device, plugin, _stepper(members, data, device, plugin, together))
        for text in header:
            print(text, flush=True)
        fitting.run()
    return members


def _plugin(member: Member, data: ImageData, device: torch.device) -> Precision:
    trainer = member.run.trainer
    wrong = wrong_in_bf16(member.module.model, member.module.scaling(data.sample(2)))
    wanted = str(
        precision(trainer.precision, trainer.accelerator, wrong, lost_in_bf16(member.run.task_name, member.spec))
    )
    if wanted.startswith("64"):
        return DoublePrecision()
    return MixedPrecision("bf16-mixed", device.type) if wanted == "bf16-mixed" else Precision()


def _stepper(
    members: Sequence[Member], data: ImageData, device: torch.device, plugin: Precision, together: bool | None
) -> InTurn | Together:
    draws = Draws(len(members), device)
    models = [m.module.model for m in members]
    runs = [m.run for m in members]
    wanted = folds(runs, models[0], device) if together is None else together and not apart(runs)
    if wanted and len(members) > 1 and same_shape(models):
        for member in members:
            member.module.train()
        stack = stacked(models)
        folded = fold(models, stack, draws)
        x = members[0].module.scaling(data.sample(4).to(device))
        if computes_the_same(folded, models, x, draws):
            return Together(members, draws, plugin.train_step_context, folded, stack)
    return InTurn(members, draws, plugin.train_step_context)


class _Fit:
    """The epochs of all members. Batch order, draws, steps and validations are those of a run with each one's seed."""

    def __init__(
        self,
        members: Sequence[Member],
        data: ImageData,
        device: torch.device,
        plugin: Precision,
        stepper: InTurn | Together,
    ) -> None:
        self.members, self.data, self.device, self.plugin, self.stepper = members, data, device, plugin, stepper
        self.trainer = members[0].run.trainer
        self.loaders = [self._loader(m) for m in members]
        self.batches = _share(self.trainer.limit_train_batches, len(self.loaders[0]))
        accumulate = members[0].module.recipe.accumulate
        self.window = self.batches if accumulate == "epoch" else plan_of(accumulate)[0]
        self.at = members[0].module.recipe.schedule_at
        per_epoch = max(1, -(-self.batches // self.window))
        self.length = per_epoch * (self.trainer.max_epochs or 1), per_epoch
        self.schedulers = stepper.schedulers(*self.length)
        self.steps = 0

    def _loader(self, member: Member) -> MemoryLoader:
        self.data.seed = member.run.seed
        return cast("MemoryLoader", self.data.train_dataloader())  # of images in memory

    def run(self) -> None:
        for member in self.members:
            member.begin(*self.length)
        epochs = self.trainer.max_epochs or 1
        for epoch in range(epochs):
            self._epoch(epoch)
            if (epoch + 1) % (self.trainer.check_val_every_n_epoch or 1) == 0:
                self._validate(epoch)
            if all(m.ended for m in self.members):
                break
        self._switch("eval")
        for i, member in enumerate(self.members):
            if not member.ended:
                member.end("finished", epochs, self.steps)
            member.settle(self._averaged(i))

    def _epoch(self, epoch: int) -> None:
        self._switch("train")
        for member, loader in zip(self.members, self.loaders, strict=True):
            member.module.augment.epoch = epoch
            loader.set_epoch(epoch)
        seen = 0  # images of the accumulation window under way
        for batch, got in enumerate(zip(*self.loaders, strict=True)):
            if batch == self.batches:
                break
            last = batch + 1 == self.batches
            now = (batch + 1) % self.window == 0 or last
            images = len(got[0][0])
            typical = self.loaders[0].mean_batch
            weight = images / typical if self.window > 1 else 1.0
            seen = images if batch % self.window == 0 else seen + images
            scale = scale_of(self.window, typical, seen) if now and self.window > 1 else 1.0
            seeds = [mix(m.run.seed, 0, epoch, batch) >> 1 for m in self.members]
            sent = [(x.to(self.device), y.to(self.device)) for x, y in got]
            self.stepper.step(sent, seeds, weight / self.window, scale if now else None)
            self.steps += now
            self._after_batch(epoch, last, now)

    def _after_batch(self, epoch: int, last: bool, now: bool) -> None:
        interval = self.at["interval"]
        if "monitor" not in self.at and (now if interval == "step" else last):
            for scheduler in self.schedulers:
                scheduler.step()
        # A look at every batch waits for the device, which costs nothing on a CPU.
        looks = last or self.device.type == "cpu"
        finite = self.stepper.sums[:, 0].isfinite().tolist() if looks else [True] * len(self.members)
        for member, fine in zip(self.members, finite, strict=True):
            if not member.ended:
                member.after_batch(epoch, self.steps, last)
                if not fine and (member.run.guard or {}).get("action") != "none":
                    member.end("failed", epoch, self.steps)

    def _validate(self, epoch: int) -> None:
        self._switch("eval")
        sums = self.stepper.sums.tolist()
        self.stepper.sums.zero_()
        for i, member in enumerate(self.members):
            if not member.ended:
                with self.stepper.draws.of(i):
                    member.validate(
                        self.data, epoch, self.steps, sums[i], self.plugin.val_step_context(), self._averaged(i)
                    )
        if "monitor" in self.at:
            for member, scheduler in zip(self.members, self.schedulers, strict=True):
                if member.curve:
                    scheduler.step(member.curve[-1][self.at["monitor"]])

    def _averaged(self, member: int) -> bool:
        return has_two_points(self.stepper.optimizer_of(member))

    def _switch(self, mode: str) -> None:
        """To the weights that schedule-free optimizers evaluate at, or back to those that they train."""
        for optimizer in self.stepper.optimizers:
            if has_two_points(optimizer):
                getattr(optimizer, mode)()


def _share(limit: float | None, batches: int) -> int:
    """How many of an epoch's batches are trained on; limit: a number of batches, a share of them, or None."""
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)

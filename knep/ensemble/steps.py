"""A training step of all members: each in its turn, or in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from pytorch_optimizer import Adan, Lion, ScheduleFreeAdamW
from torch import Tensor
from torch.optim import Optimizer

from knep.ensemble.member import Member
from knep.ensemble.rng_streams import Draws
from knep.ensemble.stacked_model import Stack
from knep.errors import named
from knep.optim.gradients import gradients, scale_
from knep.optim.optimizers import Idle
from knep.optim.param_groups import decayed, param_groups
from knep.recipes.regularization import Regularizer
from knep.tasks.classification import Classification

Batch = tuple[Tensor, Tensor]
Context = Callable[[], AbstractContextManager]

# Update rules that treat each element by itself: one optimizer steps the stacked parameters of all members.
_ELEMENTWISE = (
    *(getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "RMSprop")),
    *(torch.optim.NAdam, torch.optim.RAdam, Lion, Adan, ScheduleFreeAdamW, Idle),
)
# The settings with which they do so; the libraries have others, such as centred gradients. A wrap makes another class.
_SETTINGS = {
    *(
        "_target_",
        "_partial_",
        "accumulate",
        "lr",
        "lr_per",
        "weight_decay",
        "betas",
        "eps",
        "momentum",
        "nesterov",
        "fused",
    ),
    *("foreach", "alpha", "rho", "momentum_decay", "warmup_steps", "wrap"),
}


class InTurn:
    """A pass and an optimizer for each member: the operations of a single run, to the bit.

    context: of the forward pass and the loss. sums: (N, 3), of training loss, correct answers and images so far.
    """

    def __init__(self, members: Sequence[Member], draws: Draws, context: Context) -> None:
        self.members, self.draws, self.context = members, draws, context
        self.sums = torch.zeros(len(members), 3, dtype=torch.float64, device=draws.device)
        self.optimizers: list[Any] = [m.module.recipe.optimizer(m.module.model) for m in members]

    def schedulers(self, total_steps: int, steps_per_epoch: int) -> list[Any]:
        return _schedulers(self.members, self.optimizers, total_steps, steps_per_epoch)

    def optimizer_of(self, member: int) -> Optimizer:
        return self.optimizers[member]

    def step(self, batches: Sequence[Batch], seeds: Sequence[int], weight: float, scale: float | None) -> None:
        """One batch each. weight: of its loss; scale: on the gradients before the optimizer's step, None for none."""
        for i, (member, batch, seed) in enumerate(zip(self.members, batches, seeds, strict=True)):
            if member.ended:
                continue
            self.draws.seed(i, seed)
            with self.draws.of(i):
                if scale is None:
                    self._pass(i, batch, weight, None)
                else:
                    member.module.step.take(self.optimizers[i], lambda: self._pass(i, batch, weight, scale))  # noqa: B023

    def _pass(self, i: int, batch: Batch, weight: float, scale: float | None) -> Tensor:
        step = self.members[i].module.step
        found = step.backward(batch, weight, self.context)
        if scale is not None:
            step.scale(scale)
            if step.clips:
                step.clip()
        loss, correct, rows = found.counted
        self.sums[i] += torch.stack([loss.detach(), correct, torch.full_like(correct, int(rows))])
        return found.total


class Together:
    """One pass for all members, whose parameters are views of `stack`.

    One optimizer steps the stack where its rule is elementwise and the members' settings are the same; otherwise each
    member has its own, on its views, which makes any rule exact.
    """

    def __init__(
        self, members: Sequence[Member], draws: Draws, context: Context, folded: torch.nn.Module, stack: Stack
    ) -> None:
        self.members, self.draws, self.context, self.folded, self.stack = members, draws, context, folded, stack
        self.sums = torch.zeros(len(members), 3, dtype=torch.float64, device=draws.device)
        names = {id(p): name for name, p in members[0].module.model.named_parameters()}
        self._decayed = [names[id(p)] for p in decayed(members[0].module.model)]
        self._penalised = [type(m.module.recipe.regularization).penalty is not Regularizer.penalty for m in members]
        self._views = [dict(m.module.model.named_parameters()) for m in members]
        own = [m.module.recipe.optimizer(m.module.model) for m in members]
        self._shared = _one_rule_for_all(members, own[0])
        self.optimizers = [self._of_the_stack()] if self._shared else own

    def _of_the_stack(self) -> Optimizer:
        module = self.members[0].module
        recipe = module.recipe
        with named("optimizer"):
            groups = param_groups(
                module.model, lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
            )
            for group in groups:
                group["params"] = [self.stack[name] for name in group["param_names"]]
            return recipe.optimizer_of(groups)

    def schedulers(self, total_steps: int, steps_per_epoch: int) -> list[Any]:
        return _schedulers(self.members, self.optimizers, total_steps, steps_per_epoch)

    def optimizer_of(self, member: int) -> Optimizer:
        return self.optimizers[0 if self._shared else member]

    def step(self, batches: Sequence[Batch], seeds: Sequence[int], weight: float, scale: float | None) -> None:
        """As for `InTurn`."""
        with torch.enable_grad():
            with self.context():
                loss = self._losses(batches, seeds, weight)
            loss.backward()
        if scale is None:
            return
        if scale != 1:
            scale_(gradients(self.stack.values()), scale)
        clips = any(m.module.step.clips for m in self.members)
        if clips or not self._shared:
            self._give_gradients()
        for member in self.members if clips else ():
            member.module.step.clip()
        for optimizer in self.optimizers:
            optimizer.step()
        for i, member in enumerate(self.members):
            member.module.step.after(self.optimizer_of(i))
        for p in self.stack.values():
            p.grad = None

    def _losses(self, batches: Sequence[Batch], seeds: Sequence[int], weight: float) -> Tensor:
        """The sum of the members' losses, 0-dim: the gradient of each is its own."""
        x, y = self._inputs(batches, seeds)
        count = len(self.members)
        logits = self.folded(x)
        tasks: list[Any] = [m.module.task for m in self.members]  # one class of several, as `supports` asks for
        losses = _losses(tasks, logits, y)
        with torch.no_grad():
            correct = tasks[0].right(logits, y).view(count, -1).sum(1)
            images = len(x) // count
            self.sums += torch.stack([losses * images, correct, torch.full_like(correct, images)], 1)
        return (losses.sum() + self._penalties()) * weight

    def _inputs(self, batches: Sequence[Batch], seeds: Sequence[int]) -> Batch:
        """The scaled images (N B, C, H, W) and the labels (N B,) or (N B, K), each member's augmented by its draws."""
        got = []
        for i, (member, batch, seed) in enumerate(zip(self.members, batches, seeds, strict=True)):
            self.draws.seed(i, seed)
            with self.draws.of(i):
                step = member.module.step
                got.append(step.task.augmented(*step.task.split(batch), step.augment))
        x, y = (torch.cat(parts) for parts in zip(*got, strict=True))
        module = self.members[0].module
        return module.scaling(x).to(memory_format=module.layout), y

    def _penalties(self) -> Tensor | float:
        if not any(self._penalised):
            return 0.0
        split = [self.stack[name].unbind() for name in self._decayed]
        return sum(
            (m.module.recipe.regularization.penalty([p[i] for p in split]) for i, m in enumerate(self.members)), 0.0
        )

    def _give_gradients(self) -> None:
        """Each member's parameters get their share of the stack's gradients, as views."""
        for name, p in self.stack.items():
            if p.grad is not None:
                for views, grad in zip(self._views, p.grad.unbind(), strict=True):
                    views[name].grad = grad


def _one_rule_for_all(members: Sequence[Member], optimizer: Optimizer) -> bool:
    first = members[0].run
    same = all(m.run.slots[k] == first.slots[k] for m in members for k in ("optimizer", "scheduler"))
    same = same and all(m.run.layer_decay == first.layer_decay for m in members)
    own_metric = "monitor" in members[0].module.recipe.schedule_at
    return same and not own_metric and type(optimizer) in _ELEMENTWISE and set(first.slots["optimizer"]) <= _SETTINGS


def _losses(tasks: Sequence[Classification], logits: Tensor, y: Tensor) -> Tensor:
    """Mean loss of each member, (N,), from outputs (N B, K)."""
    if len({task.smoothing for task in tasks}) == 1:
        return tasks[0].loss(logits, y, "none").view(len(tasks), -1).mean(1)
    parts = zip(tasks, logits.chunk(len(tasks)), y.chunk(len(tasks)), strict=True)
    return torch.stack([task.loss(a, b) for task, a, b in parts])


def _schedulers(members: Sequence[Member], optimizers: Sequence[Optimizer], total: int, per_epoch: int) -> list[Any]:
    return [
        m.module.recipe.scheduler(o, total_steps=total, steps_per_epoch=per_epoch)
        for m, o in zip(members, optimizers, strict=False)
    ]

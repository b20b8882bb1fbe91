"""The optimizers and schedules of a fit: the recipe's, or the module's own with the recipe's schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from knep.engine.any_module.part import (
    Part,
    few,
    name_of,
    network,
    networks,
    optimizers_of,
    parameters_of,
)
from knep.engine.loops.run_length import run_length
from knep.errors import InputError, named
from knep.optim.param_groups import decayed, rate


class Optimizers:
    """Makes them, and edits weights behind each step.

    parts: brought into the order in which the module takes its optimizers; hooks: where hooks are put that are removed
    behind the fit; say: one line to the user.
    """

    def __init__(self, parts: list[Part], hooks: list[Any], say: Callable[[Trainer, str], None]) -> None:
        self._parts, self.hooks, self._say = parts, hooks, say
        self._own: Any = None  # what the module's own configure_optimizers makes
        self._trainer: Trainer | None = None

    def configure(
        self, trainer: Trainer, module: LightningModule, own: Callable[[], Any], made_elsewhere: bool = False
    ) -> Any:
        """In the place of `configure_optimizers`. made_elsewhere: own is no method of the module's class."""
        self._trainer = trainer
        overridden = made_elsewhere or type(module).configure_optimizers is not LightningModule.configure_optimizers
        if not overridden and not all(part.optimizes for part in self._parts):
            raise InputError(
                f"optimizer=none leaves the optimizer to {name_of(module)}, which has no configure_optimizers: write "
                "one, or choose an optimizer"
            )
        # Also where the recipe's acts in its place: it may make what other methods of the module read.
        self._own = own() if overridden else None
        if not any(part.optimizes for part in self._parts):
            return self._around_own(trainer, module)
        if not all(part.optimizes for part in self._parts):
            raise InputError("optimizer=none for one network leaves its optimizer to nobody: choose one for each")
        if overridden:
            self._say(trainer, f"the recipe's optimizer acts in place of {name_of(module)}.configure_optimizers")
        made = [self._made(trainer, module, part) for part in self._parts]
        return self._automatic(trainer, made[0]) if module.automatic_optimization else self._by_hand(module, made)

    def _by_hand(self, module: LightningModule, made: list[Any]) -> Any:
        """The parts' optimizers in the module's order; their schedules, where nobody steps them, are stepped here."""
        optimizers, schedulers = optimizers_of(self._own) if self._own is not None else ([None] * len(made), [])
        if len(optimizers) == len(made) and self._own is not None:
            made = self._in_order(module, optimizers, made)
        if len(optimizers) != len(made):
            names = ", ".join(f'"{path}": ...' for path in networks(module))
            raise InputError(
                f"{name_of(module)} makes {len(optimizers)} optimizers, and model= names {len(made)} networks: "
                f"write model={{{names}}}, one for each in their order"
            )
        found = [
            {"scheduler": schedule, **part.recipe.schedule_at} for part, schedule in zip(self._parts, made, strict=True)
        ]
        if schedulers:  # which it steps itself
            for part in self._parts:
                part.total = None
            return [p.optimizer for p in self._parts], found
        for part, schedule in zip(self._parts, made, strict=True):
            if isinstance(schedule, ReduceLROnPlateau):
                raise InputError(
                    f"scheduler=plateau follows a metric, and {name_of(module)} optimizes by hand without a "
                    "schedule of its own: load the recipe with another one"
                )
            part.scheduler = schedule
        return [p.optimizer for p in self._parts]

    def _automatic(self, trainer: Trainer, schedule: Any) -> Any:
        part = self._parts[0]
        at = dict(part.recipe.schedule_at)
        if isinstance(schedule, ReduceLROnPlateau):
            at = {
                "interval": "epoch",
                **at,
                "reduce_on_plateau": True,
                "frequency": trainer.check_val_every_n_epoch or 1,
            }
        return {"optimizer": part.optimizer, "lr_scheduler": {"scheduler": schedule, **at}}

    def _made(self, trainer: Trainer, module: LightningModule, part: Part) -> Any:
        net = network(module, part.path)
        assert net is not None
        inside = {id(p) for other in self._parts for p in parameters_of(module, other.path)}
        outside = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in inside]
        if outside and len(self._parts) > 1:
            raise InputError(
                f"nobody trains {', '.join(outside[:3])}, outside of the networks that model= names: name its network "
                "too, or freeze it"
            )
        if outside and part.tunes:
            raise InputError(
                f"finetune= acts on {part.path}, and {few(outside)} outside of it: name the module itself, "
                'model="", or freeze what is outside'
            )
        if outside:
            self._say(trainer, f"{few(outside)} outside of {part.path} trained by the recipe's optimizer too")
        part.recipe.refuse_clip(module if outside else net)
        with named("optimizer"):
            part.optimizer = part.recipe.optimizer(module if outside else net, tuning=part.tuning)
        self._after_steps(part, net, part.optimizer)
        return self._schedule(trainer, part)

    def _schedule(self, trainer: Trainer, part: Part) -> Any:
        """The recipe's, for as many steps as this fit has."""
        assert part.optimizer is not None
        total, per_epoch = run_length(trainer, part.recipe, len(self._parts))
        made = part.recipe.scheduler(part.optimizer, total_steps=total, steps_per_epoch=per_epoch)
        part.total = total if part.schedules and not isinstance(made, ReduceLROnPlateau) else None
        return made

    def ended(self, trainer: Trainer, module: LightningModule) -> None:
        """At the end of a fit: what a schedule did not come to. A fit that was stopped early ends it early."""
        for part in self._parts:
            if part.total is not None and 0 < part.steps < part.total and not trainer.should_stop:
                steps = "max_steps=N, of all optimizers" if len(self._parts) > 1 else f"max_steps={part.steps}"
                self._say(
                    trainer,
                    f"the schedule was made for {part.total} steps, and {name_of(module)} took {part.steps}: give the "
                    f"Trainer {steps}, or load the recipe with scheduler=none",
                )

    def _around_own(self, trainer: Trainer, module: LightningModule) -> Any:
        """The module's own optimizers, with the recipe's penalty, clip and, where it has none, its schedule."""
        optimizers, schedulers = optimizers_of(self._own)
        if len(optimizers) != len(self._parts):
            raise InputError(
                f"{name_of(module)} makes {len(optimizers)} optimizers, and model= names {len(self._parts)} networks"
            )
        for part in self._parts:
            if part.tuning is not None and set(part.tuning.factors(part.recipe.lr).values()) != {1.0}:
                raise InputError(
                    f"finetune= gives layers rates of their own, and optimizer=none leaves the optimizer to "
                    f"{name_of(module)}: choose an optimizer, or finetune.head_lr=null and no layer_decay"
                )
        found = []
        for part, made in zip(self._parts, optimizers, strict=True):
            net = network(module, part.path)
            assert net is not None
            part.optimizer = made
            part.recipe.refuse_clip(net)
            self._after_steps(part, net, made)
            if not part.schedules:  # to make one that changes nothing would set rates back that the module's own set
                continue
            if schedulers:
                raise InputError(
                    f"the recipe's schedule and that of {name_of(module)}.configure_optimizers would both set the "
                    "rate: load the recipe with scheduler=none"
                )
            found.append({"scheduler": self._schedule(trainer, part), **part.recipe.schedule_at})
        if not found:
            return self._own
        if not module.automatic_optimization:
            raise InputError(f"{name_of(module)} optimizes by hand: load the recipe with scheduler=none")
        return optimizers, found

    def _in_order(self, module: LightningModule, own: Sequence[Any], made: list[Any]) -> list[Any]:
        """The schedules, and with them the parts, in the order in which the module takes its optimizers."""
        owners = [{id(p) for group in o.param_groups for p in group["params"]} for o in own]
        places = []
        for part in self._parts:
            inside = {id(p) for p in parameters_of(module, part.path)}
            there = [i for i, ids in enumerate(owners) if ids & inside]
            if len(there) != 1:
                raise InputError(
                    f"the parameters of {part.path} are in {len(there)} of the optimizers that "
                    f"{name_of(module)}.configure_optimizers makes, and a recipe makes one for them: name networks "
                    "that have one each"
                )
            places.append(there[0])
        if sorted(places) != list(range(len(own))):
            raise InputError(f"two networks of model= share an optimizer of {name_of(module)}: name them together")
        order = sorted(range(len(places)), key=places.__getitem__)
        self._parts[:] = [self._parts[i] for i in order]
        return [made[i] for i in order]

    def _after_steps(self, part: Part, net: nn.Module, made: Optimizer) -> None:
        part.decayed = decayed(net)

        def after(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            now = rate(stepped)
            part.rates = (part.rates[0] if part.steps else now, now)
            part.steps += 1
            if part.total is not None and part.steps == part.total + 1 and self._trainer is not None:
                self._say(
                    self._trainer,
                    f"the schedule was made for {part.total} steps, and the fit goes on behind them at a rate of "
                    f"{now:.3g}: give the Trainer max_steps=N, or load the recipe with scheduler=none",
                )
            if part.edits:
                with torch.no_grad():
                    part.recipe.regularization.after_step(part.decayed, now)
                part.edited += 1
            if part.scheduler is not None:
                part.scheduler.step()

        self.hooks.append(made.register_step_post_hook(after))
        add = made.add_param_group

        def add_param_group(group: dict[str, Any]) -> None:
            """Of a callback that thaws layers: with the keys that the others have."""
            params = list(group["params"]) if not isinstance(group["params"], Tensor) else [group["params"]]
            names = {id(p): name for name, p in net.named_parameters()}
            like = made.param_groups[0]
            group["params"] = params
            if "param_names" in like:
                group.setdefault("param_names", [names.get(id(p), "") for p in params])
            for key in like:
                if key not in group and key != "initial_lr":
                    group[key] = like[key]
            add(group)
            group.setdefault("initial_lr", group["lr"])
            for schedule in [config.scheduler for config in module_schedules()]:
                schedule.base_lrs.append(group["lr"])
                if hasattr(schedule, "lr_lambdas"):
                    schedule.lr_lambdas.append(schedule.lr_lambdas[0])

        def module_schedules() -> list[Any]:
            return [c for c in self._schedules() if getattr(c.scheduler, "optimizer", None) is made]

        made.add_param_group = add_param_group  # type: ignore[method-assign]

    def _schedules(self) -> list[Any]:
        return [] if self._trainer is None else self._trainer.lr_scheduler_configs

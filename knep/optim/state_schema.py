"""What the state of an optimizer and of a schedule may hold: what the config's own keep after a step, and no other.

An optimizer reads its state without a look at it: fused kernels read and write memory by the parameter's shape alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from knep.io.pickle_scan import overlaps
from knep.io.schema import Check, alike, either, items, listed, number, record, same, whole
from knep.optim.schedules import Unchanged
from knep.utils.text import shortened

# What steps, schedules and changed values on resume move: only its kind and range are fixed.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_MOVES = (*_RATES, "betas", "momentum", "train_mode", "_last_lr", "base_lrs", "last_epoch", "_step_count")
_MOVES += ("best", "num_bad_epochs", "cooldown_counter")


def tensor(like: Tensor, finite: bool = False) -> Check:
    """A tensor of the shape and the kind of numbers (float, or which whole ones) of `like`, each in its own place.

    finite: whether all must be, where those of `like` are.
    """

    def check(value: object) -> str | None:
        if not isinstance(value, Tensor):
            return f" is a {type(value).__name__}, not a tensor"
        if value.shape != like.shape:
            return f" has the shape {tuple(value.shape)}, not {tuple(like.shape)}"
        if _kind(value) != _kind(like):
            return f" is of {value.dtype}, not {like.dtype}"
        if overlaps(value):
            return " has numbers that lie on one another in memory"
        if finite and like.isfinite().all() and not value.isfinite().all():
            return " has numbers that are not finite"
        return None

    return check


def _kind(t: Tensor) -> str:
    return "float" if t.is_floating_point() else str(t.dtype)


class Expected:
    """The optimizer and the schedule that `config` gives `model`, new ones, after a step; all three are spent.

    finite: whether the state has to be where a guard looks at it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        config: Mapping[str, Any],
        finite: bool = True,
    ) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler
        self.by_validation = isinstance(self._scheduler, ReduceLROnPlateau)
        before = [dict(group) for group in self._optimizer.param_groups]
        self._finite = finite and config.get("guard", {}).get("action") not in (None, "none")
        with torch.random.fork_rng(devices=[]):
            self._optimizer.step(lambda: _some_gradients(model))  # type: ignore[arg-type]
        # A schedule of the momentum is torch's or a user's, or the one of these that sets it.
        own = type(self._scheduler) in (LambdaLR, ReduceLROnPlateau, Unchanged)
        self._moves = {*_MOVES} - ({"momentum", "betas"} if own else set())
        self._added: set[str] = set()  # what the first step puts into a group
        for was, group in zip(before, self._optimizer.param_groups, strict=True):
            self._added |= {*group} - {*was}
            self._moves |= _moved_by_a_step(was, group, config["optimizer"])

    def optimizer(self, steps: int) -> Check:
        """The state_dict of the optimizer after `steps` optimizer steps."""
        sample = self._optimizer.state_dict()
        states = {k: self._state(v, steps) for k, v in sample["state"].items()}
        groups = items(*(self._group(group, steps) for group in sample["param_groups"]))
        return record({k: alike(v) for k, v in sample.items()} | {"state": record({}, states), "param_groups": groups})

    def _state(self, sample: object, steps: int) -> Check:
        """What is kept for a parameter; nothing where it met no gradient."""
        if isinstance(sample, Mapping):
            held = {k: _count(v, steps) if k == "step" else self._state(v, steps) for k, v in sample.items()}
            return either(record(held), same({}))
        if isinstance(sample, (list, tuple)):
            return items(*(self._state(v, steps) for v in sample))
        return tensor(sample, self._finite) if isinstance(sample, Tensor) else alike(sample)

    def _group(self, sample: Mapping[str, Any], steps: int) -> Check:
        """A parameter group: the values that the config gives, and of what steps may move the kind and range."""

        def of(key: str, value: object) -> Check:
            if key == "step":
                return _count(value, steps)
            if isinstance(value, Tensor):
                return tensor(value, finite=True)
            return _moved(key, value) if key in self._moves else same(value)

        checks = {key: of(key, value) for key, value in sample.items()}
        later = {} if steps else {key: checks.pop(key) for key in self._added}
        return record(checks, later)

    def schedule(self, groups: int) -> Check:
        """The state_dict of the schedule for so many parameter groups."""
        sample = self._scheduler.state_dict()
        checks = {k: alike(v) if k in _MOVES or _is_odd(v) else same(v) for k, v in sample.items()}
        checks |= {k: number(finite=False) for k in ("best",) if k in sample}
        checks |= {k: listed(number(0), groups, groups) for k in ("_last_lr", "base_lrs") if k in sample}
        return record(checks)


def _moved_by_a_step(was: Mapping[str, Any], group: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """Keys of a group that count or estimate something: what the config gives is none of them."""
    counted = {k for k, v in group.items() if k not in was or (type(v) is int and v != was[k])}
    return counted | {k for k, v in group.items() if type(v) is float and k not in given}


def _some_gradients(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=draw).to(p)
    return torch.ones(())


def _count(sample: object, steps: int) -> Check:
    """A number of steps, in a tensor or without one, of at most `steps`."""
    if not isinstance(sample, Tensor):
        return whole(0, steps)

    def check(value: object) -> str | None:
        wrong = tensor(sample, finite=True)(value)
        if wrong or not isinstance(value, Tensor):
            return wrong
        if value.dtype != sample.dtype:
            return f" is of {value.dtype}, not {sample.dtype}"
        odd = next((n for n in value.flatten().tolist() if n != int(n) or not 0 <= n <= steps), None)
        return None if odd is None else f" is {odd} after {steps} steps"

    return check


def _moved(key: str, value: Any) -> Check:
    if key in _RATES and type(value) in (int, float):
        return number(0)
    if key == "betas":
        return items(*(number(0, 1) for _ in value))
    if key == "momentum":
        return number(0, 1)
    return either(whole(min(0, value)), number()) if type(value) is int else alike(value)


def _is_odd(value: object) -> bool:
    """Whether a schedule's value is another schedule or the like, and no setting."""
    return not isinstance(value, (bool, int, float, str, list, tuple, type(None)))


def rates_wrong(stored: Mapping[str, Any], groups: list[Mapping[str, Any]], done: int) -> Iterator[str]:
    """What the schedule says that the optimizer's groups, or the `done` steps of the schedule, do not."""
    rates, bases = [g["lr"] for g in groups], [g.get("initial_lr", g["lr"]) for g in groups]
    known = {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates, "base_lrs": bases}
    for key, other in known.items():
        its = stored.get(key, other)
        if (list(its) if isinstance(its, tuple) else its) != other:
            yield f"{key} is {shortened(str(its), 60)}, and by another count {shortened(str(other), 60)}"

"""What stands around any update rule: `optimizer.wrap=[centralize,cautious,lookahead]`, each once, in this order.

An optimizer keeps being what it is, with a step of more parts: what is wrapped around it has its state among the
optimizer's own, so that it is saved, loaded, looked at by the guard and put back with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_optimizer
import torch
from pytorch_optimizer.base.optimizer import BaseOptimizer
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
from torch import Tensor
from torch.optim import Optimizer

from knep.errors import InputError
from knep.optim.gradients import gradients
from knep.optim.optimizers import NormalizedSGD, Shampoo
from knep.utils.validation import check, whole

_SLOW, _COUNT = "lookahead_slow", "lookahead_step"


class Wrap:
    """A part of a step. `before` sees the gradients that the update is made of, `after` the weights that it made."""

    def before(self, optimizer: Optimizer) -> None:
        pass

    def after(self, optimizer: Optimizer) -> None:
        pass

    def give_up(self, optimizer: Optimizer) -> None:
        """A step that began with `before` raised."""


class Centralize(Wrap):
    """Takes the mean over all axes but the first out of each gradient of two axes or more (Yong et al. 2020, eq. 1)."""

    def before(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            found = gradients(group["params"])
            if found:
                centralize_gradient(found)


class Cautious(Wrap):
    """Moves only weights whose update goes against the gradient, those by d / (moved + 1) more of d in a tensor.

    Liang et al. 2024, algorithm 1. Decoupled weight decay is no part of the update: it acts on all weights.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor, Tensor, float]] = []  # parameter, weights, gradient, factor of decay
        self._decays: list[float] = []

    def before(self, optimizer: Optimizer) -> None:
        self._decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            apart = _decoupled(optimizer, group)
            shrink = 1 - float(group["lr"]) * group.get("weight_decay", 0.0) if apart else 1.0
            if apart:
                group["weight_decay"] = 0.0
            for p in group["params"]:
                if p.grad is not None:
                    self._held.append((p, p.detach().clone(), p.grad.detach().clone(), shrink))

    def after(self, optimizer: Optimizer) -> None:
        for p, old, grad, shrink in self._held:
            update = old - p
            BaseOptimizer.apply_cautious(update, grad)
            p.copy_(old.mul_(shrink).sub_(update))
        self.give_up(optimizer)

    def give_up(self, optimizer: Optimizer) -> None:
        for group, decay in zip(optimizer.param_groups, self._decays, strict=False):
            group["weight_decay"] = decay
        self._held, self._decays = [], []


def _decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the update rule shrinks the weights by lr * weight_decay, beside what it makes of the gradient."""
    own = isinstance(optimizer, (NormalizedSGD, Shampoo))
    return bool(own or group.get("decoupled_weight_decay") or group.get("weight_decouple"))


class Lookahead(Wrap):
    """Every k steps the weights go back to alpha of the way that they came since the last time (Zhang et al. 2019).

    Algorithm 1: slow <- slow + alpha (weights - slow); weights <- slow. Evaluated are the weights, which are the slow
    ones at each k-th step. The optimizer's own momentum is kept.

    k: steps, from 1 on; alpha: in (0, 1].
    """

    def __init__(self, k: int = 5, alpha: float = 0.5) -> None:
        whole("optimizer.wrap: lookahead.k", k, 1)
        check("optimizer.wrap: lookahead.alpha", alpha, "(0, 1]")
        self.k, self.alpha = k, alpha
        self._first: dict[Tensor, Tensor] = {}  # weights before their first step, which the optimizer has no state of

    def before(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and _SLOW not in optimizer.state.get(p, {}):
                    self._first[p] = p.detach().clone()

    def after(self, optimizer: Optimizer) -> None:
        for p, value in self._first.items():
            optimizer.state[p][_SLOW] = value
        self._first = {}
        for group in optimizer.param_groups:
            group[_COUNT] = group.get(_COUNT, 0) + 1
            if group[_COUNT] % self.k:
                continue
            moved = [p for p in group["params"] if _SLOW in optimizer.state.get(p, {})]
            if moved:
                slow = [optimizer.state[p][_SLOW] for p in moved]
                torch._foreach_lerp_(slow, moved, self.alpha)
                torch._foreach_copy_(moved, slow)

    def give_up(self, optimizer: Optimizer) -> None:
        self._first = {}


WRAPS: dict[str, type[Wrap]] = {"centralize": Centralize, "cautious": Cautious, "lookahead": Lookahead}


def _step(base: type[Optimizer], wraps: Sequence[Wrap]) -> Callable[..., Any]:
    """The step of `base` with the wraps around it."""

    @torch.no_grad()
    def begin(optimizer: Optimizer) -> None:
        for wrap in wraps:
            wrap.before(optimizer)

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        def gradients_then() -> Any:
            assert closure is not None
            with torch.enable_grad():
                loss = closure()
            begin(self)
            return loss

        try:
            if closure is None:
                begin(self)
            loss = base.step(self, None if closure is None else gradients_then)  # type: ignore[arg-type]
            with torch.no_grad():
                for wrap in wraps:
                    wrap.after(self)
        except BaseException:
            for wrap in wraps:
                wrap.give_up(self)
            raise
        return loss

    return step


def wraps_of(asked: object) -> list[Wrap]:
    """The wraps that `optimizer.wrap` names: centralize, cautious, lookahead, or {lookahead: {k: 5, alpha: 0.5}}.

    Raises InputError for another name or key, one that is there twice, or values out of range.
    """
    if not isinstance(asked, (list, tuple)):
        raise InputError(f"optimizer.wrap={asked} is no list: write optimizer.wrap=[{asked}], or [] for none")
    entries = [_entry(entry) for entry in asked]
    names = [name for name, _ in entries]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"optimizer.wrap has {twice} twice: write it once")
    return [_made(name, values) for name, values in entries]


def _entry(entry: object) -> tuple[str, dict[str, Any]]:
    name, values = next(iter(entry.items())) if isinstance(entry, Mapping) and len(entry) == 1 else (entry, {})
    if name not in WRAPS or not isinstance(values, Mapping):
        raise InputError(f"optimizer.wrap={entry} is unknown: write some of {', '.join(WRAPS)}")
    return str(name), {str(key): value for key, value in values.items()}


def _made(name: str, values: dict[str, Any]) -> Wrap:
    known = {"lookahead": ("k", "alpha")}.get(name, ())
    odd = next((key for key in values if key not in known), None)
    if odd is not None:
        takes = f"{' and '.join(known)} alone" if known else "no key"
        raise InputError(f"optimizer.wrap: {name} takes {takes}, not {odd}: leave it out")
    return WRAPS[name](**values)


def wrapped(optimizer: Optimizer, asked: object) -> Optimizer:
    """The same optimizer with the wraps around its step; of SAM around the step of its base, with the second gradient.

    Raises InputError as `wraps_of`, and for a wrap that edits weights which the optimizer keeps two points of.
    """
    wraps = wraps_of(asked)
    if not wraps:
        return optimizer
    if callable(getattr(optimizer, "eval", None)) and any(not isinstance(w, Centralize) for w in wraps):
        raise InputError(
            f"optimizer.wrap edits the steps of {type(optimizer).__name__}, whose weights are a mixture that it makes "
            "itself: write optimizer.wrap=[centralize], or []"
        )
    if isinstance(optimizer, pytorch_optimizer.SAM):
        wrapped(optimizer.base_optimizer, asked)
        return optimizer
    base = type(optimizer)
    # In the class, for copies of an optimizer take no other attributes along than its own.
    body = {"__module__": __name__, "wraps": wraps, "step": _step(base, wraps)}
    optimizer.__class__ = type(f"Wrapped{base.__name__}", (base,), body)
    return optimizer

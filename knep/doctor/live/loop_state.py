"""What only a loop shows: its modes, its learning rates, whether gradients are cleared, and whose loss is trained."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from knep.observe.layer_stats import Look

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SENTINEL = 100_000  # numbers of a parameter whose gradient is followed, at most
_NODES = 5_000  # of a loss's graph that are walked through
_LEFT = 1e-4  # of a new gradient's norm: an old one below it cannot be told from rounding


@dataclass
class Loop:
    """rates: the largest learning rate behind each step; steps: of the optimizer; depends: modules whose answer depends
    on the mode; missing, foreign: parameters that the optimizer lacks, and tensors that it has of no watched model;
    eval_steps: steps whose forward ran in eval mode; trained: whether one ran in train mode before; careless: steps
    behind which a validation ran in train mode, and whether `validate` told so; added: looks -> whether gradients of
    the step before were still there; unreached: (step, why) of looks in which no parameter got a gradient; epoch: steps
    of one, 0 where unknown.
    """

    rates: array[float] = field(default_factory=lambda: array("d"))
    steps: int = 0
    depends: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    foreign: int = 0
    eval_steps: list[int] = field(default_factory=list)
    trained: bool = False
    careless: dict[int, bool] = field(default_factory=dict)
    added: dict[int, bool] = field(default_factory=dict)
    unreached: list[tuple[int, str]] = field(default_factory=list)
    epoch: int = 0
    _mode: bool | None = None  # of the last forward with gradient
    _quiet: int = 0  # forwards without gradient in train mode since the last step
    _pauses: int = 0  # forwards without gradient since the last step
    _skips: bool = False  # this step has no loss, on purpose
    _fresh: bool = False  # the optimizer stepped since the last call of `step`
    _followers: list[_Follower] = field(default_factory=list)

    def meet(self, model: nn.Module, optimizer: Optimizer) -> None:
        """The parameters of both; a hook counts the optimizer's steps."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = dict(model.named_parameters())
        self.missing = tuple(n for n, p in named.items() if p.requires_grad and id(p) not in known)
        self.foreign = len(known - {id(p) for p in named.values()})
        self.depends = tuple(path for path, module in model.named_modules() if _depends(module))
        self._params = [p for p in named.values() if p.requires_grad and id(p) in known]
        self._optimizer = optimizer
        self._counter = optimizer.register_step_post_hook(self._count)

    @property
    def trains(self) -> bool:
        """Whether the optimizer has any of the model's parameters."""
        return bool(self._params)

    @property
    def learns(self) -> bool:
        """Whether gradients of the watched model are made: without, its losses come from elsewhere."""
        return self.trained or bool(self.eval_steps) or any(p.grad is not None for p in self._params)

    def leave(self) -> None:
        self._counter.remove()
        self.shut()

    def _count(self, *_: object) -> None:
        self.steps += 1
        self._fresh = True

    def forward(self, training: bool) -> None:
        """A forward of the watched model begins."""
        if torch.is_grad_enabled():
            self._mode = training
            return
        self._quiet += training
        self._pauses += 1
        if self._pauses >= 2 and not self.epoch:  # a validation, of more than a batch
            self.epoch = len(self.rates)

    def skipped(self) -> None:
        """The step under way is of a batch that the loop left out: that no gradient came means nothing."""
        self._skips = True

    def step(self, step: int) -> None:
        """Step number `step` is over."""
        rates = [group.get("lr") for group in self._optimizer.param_groups]
        self.rates.append(max((r for r in rates if type(r) is float or type(r) is int), default=0.0))
        if self._quiet >= 2 and self.depends:  # one may be a measure of the training batch
            self.careless.setdefault(step, False)
        if self._mode is not None and not self._mode:
            self.eval_steps.append(step)
        self.trained |= bool(self._mode)
        self._mode, self._quiet, self._pauses = None, 0, 0

    def validated(self, steps: int) -> None:
        """A validation behind so many steps is over, whose forwards without gradient came behind the last one."""
        if self._quiet and self.depends:
            self.careless[steps] = True
        self._quiet = 0
        self.epoch = self.epoch or steps

    def open(self, step: int) -> None:
        """A look begins: follows what becomes of the gradients that the last step has left."""
        if self._fresh:
            for p in self._sentinels():
                if p.grad is not None and not p.grad.is_sparse:
                    self._followers.append(_Follower(p))
        self._fresh = False

    def shut(self) -> None:
        for handle in (h for follower in self._followers for h in follower.handles):
            handle.remove()
        self._followers = []

    def close(self, look: Look, loss: Tensor | None) -> None:
        """A look is over."""
        self.added[look.step] = any(follower.added for follower in self._followers)
        self.shut()
        skips, self._skips = self._skips, False
        if look.weights and not any(w.grad_norm for w in look.weights) and self._params and not skips:
            arrived = look.clipped == 0.0
            self.unreached.append((look.step, "dropped" if arrived else self._reason(loss)))

    def _reason(self, loss: Tensor | None) -> str:
        """How a loss is apart from the model: "leaf", "other" or, where its graph does not tell, "unknown"."""
        if loss is None or (loss.grad_fn is None and not loss.requires_grad):
            return "unknown"
        if loss.grad_fn is None:
            return "leaf"
        return "unknown" if {id(p) for p in leaves(loss)} & {id(p) for p in self._params} else "other"

    def _sentinels(self) -> list[nn.Parameter]:
        small = [p for p in self._params if p.numel() <= _SENTINEL]
        return (small or self._params)[-2:]


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that the graph of a loss ends in, as far as it is walked."""
    todo, seen = [loss.grad_fn], set()
    while todo and len(seen) < _NODES:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None:
                yield variable
            todo += [before for before, _ in node.next_functions]


def _depends(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.track_running_stats
    return isinstance(module, _DROPOUTS) and module.p > 0


class _Follower:
    """Finds out whether the gradient that a step left in a parameter is still there when the next one is made."""

    def __init__(self, p: nn.Parameter) -> None:
        assert p.grad is not None
        self._left = p.grad.detach().clone()
        self._size, self._came, self.added = float(self._left.norm()), p.grad, False
        self._p, self._over = p, False
        self.handles = [p.register_hook(self._comes), p.register_post_accumulate_grad_hook(self._is_there)]

    def _comes(self, gradient: Tensor) -> None:
        self._came = gradient.detach()

    def _is_there(self, p: Tensor) -> None:
        if self._over or p.grad is None or p.grad.is_sparse:
            return
        whole = p.grad.detach()
        clear = self._size > _LEFT * float(self._came.norm())
        self.added = clear and bool((whole - self._came - self._left).norm() <= 0.01 * self._size)
        self._over = not self.added
        self._left = whole.clone()

"""Hooks that read one training step, put on before it and taken off behind it: the steps between cost nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.observe.layer_stats import (
    Layer,
    Look,
    Reading,
    Values,
    deviation,
    ends,
    looks_rectified,
    rectified,
    sample,
    signal,
    statistics,
)
from knep.observe.update_stats import dense, lengths, read, weights_of
from knep.optim.gradients import HALF
from knep.surgery.record import hooks_on

_MOST_CALLS = 400  # of modules in a forward


class Eye:
    """Reads the next step of `model` and `optimizer` until it is closed; of forwards, the first one with gradient.

    first: whether rows of the weights are compared, which the first looks alone have a use for; whole: whether the
    signal of every layer is read; door: the module that is given the batch and gives the scores, by default the model;
    told: `arrived` is called when the gradients are whole and not clipped yet, so that no hook has to find out.
    failed: the error of a hook, in words, behind which nothing more is read.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        step: int,
        *,
        first: bool = True,
        whole: bool = True,
        door: nn.Module | None = None,
        told: bool = False,
    ) -> None:
        self.look = Look(step, whole)
        self.stepped, self.failed = False, ""
        self.scores: Tensor | None = None
        self._model, self._optimizer, self._first = model, optimizer, first
        self._seen = False
        self._last: Tensor | None = None
        self._bent = False  # whether the last module was a rectifier
        self._unclipped: dict[int, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._later: list[tuple[Layer, str, Tensor]] = []
        self._weighted = self._data = 0
        self._handles = list(self._install(model if door is None else door, told))

    def _install(self, door: nn.Module, told: bool) -> Iterator[Any]:
        if not compiled(door):
            yield from hooks_on([door], self._kept(self._begin), self._kept(self._end))
        for path, module in open_modules(self._model):
            if path and not any(True for _ in module.children()):
                yield from hooks_on([module], leave=self._kept(functools.partial(self._passed, path)))
        for p in () if told else self._model.parameters():
            if p.requires_grad and p.is_leaf:
                yield p.register_post_accumulate_grad_hook(self._kept(self._accumulated))
        yield self._optimizer.register_step_pre_hook(self._kept(self._before_step))
        yield self._optimizer.register_step_post_hook(self._kept(self._after_step))

    def _kept(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook whose errors stay with the look: what cannot be read must not end the training beside it."""

        def quiet(*args: Any) -> None:
            if not self.failed:
                try:
                    hook(*args)
                except Exception as error:
                    self.failed = f"{type(error).__name__}: {error}"

        return quiet

    def close(self) -> Look:
        for handle in self._handles:
            handle.remove()
        for (layer, name, _), value in zip(self._later, read([t for *_, t in self._later]), strict=True):
            setattr(layer, name, value)
        self.look.layers = [layer for layer in self.look.layers if layer.real]
        self._handles, self._later = [], []
        self._before, self._unclipped, self._last = {}, {}, None
        return self.look

    def arrived(self) -> None:
        """The gradients of the step are whole and not clipped yet."""
        if not self.stepped:
            gradients = {id(p): dense(p.grad.detach()) for p in self._model.parameters() if p.grad is not None}
            self._unclipped = dict(zip(gradients, lengths(gradients.values()), strict=True))

    def _open(self) -> bool:
        return not self._seen and torch.is_grad_enabled() and len(self.look.layers) < _MOST_CALLS

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if self._open() and first is not None and (first.is_floating_point() or first.dtype == torch.uint8):
            self.look.input, self._data = Values.of(first), first.data_ptr()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not self._open():
            return
        scores = scores_of(output)
        if not self.look.layers and scores is not None and scores.ndim > 1 and module is self._model:
            self._passed("model", module, args, output)  # a single layer, or one that only hooks of its own run
        if scores is not None:
            self.scores = scores.detach()
            self.look.output = Values.of(scores)
            self.look.probabilities = probabilities(scores)
            self.look.classes = scores.shape[1] if scores.ndim == 2 else 0
        self._seen = True

    def _passed(self, path: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        seen = isinstance(output, Tensor) and output.is_floating_point() and output.numel() and output.ndim
        if self._open() and isinstance(output, Tensor) and seen:
            with torch.no_grad():
                self._read(path, module, args, output)

    def _read(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        given = next((a for a in args if isinstance(a, Tensor)), None)
        if any(output is a for a in args) and not getattr(module, "inplace", False):
            return  # an empty place
        if given is not None and given.is_floating_point() and isinstance(getattr(module, "weight", None), Tensor):
            self._entered(path, module, given)
        layer = Layer(path, type(module).__name__, batch=len(output))
        self._note(layer, ends(layer, module, output))
        if given is not None:
            self._note(layer, statistics(layer, module, given))
        if self.look.whole:
            self._note(layer, signal(output))
            if output.requires_grad:
                output.register_hook(self._kept(functools.partial(self._returned, layer)))
        self.look.layers.append(layer)
        self._last, self._bent = output, layer.alive is not None

    def _note(self, layer: Layer, readings: Iterable[Reading]) -> None:
        self._later += [(layer, name, value) for name, value in readings]

    def _returned(self, layer: Layer, gradient: Tensor) -> None:
        self._note(layer, [("grad_std", deviation(sample(gradient)))])

    def _entered(self, path: str, module: nn.Module, given: Tensor) -> None:
        """What a layer with weights is given: the first one's scale, and the work of a function such as F.relu."""
        if not self._weighted:
            same = self.look.input is not None and given.data_ptr() == self._data
            self.look.first = self.look.input if same else Values.of(given)
            self.look.first_kind = type(module).__name__
        elif given is not self._last and given.ndim > 1 and not self._bent:
            layer = Layer(f"input of {path}", "Identity", batch=len(given))
            readings = [*rectified(layer, given), ("real", looks_rectified(given))]
            self._note(layer, [*readings, *(signal(given) if self.look.whole else ())])
            self.look.layers.append(layer)
        self._weighted += 1

    def _accumulated(self, p: Tensor) -> None:
        if p.grad is not None:
            self._unclipped[id(p)] = lengths([dense(p.grad.detach())])[0]

    @torch.no_grad()
    def _before_step(self, *_: object) -> None:
        if not self.stepped:
            followed = {n: p for n, p in self._trained() if p.ndim > 1 or p.dtype in HALF}
            self._before = {name: p.detach().clone() for name, p in followed.items()}

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        if self.stepped:
            return
        self.stepped = True
        self.look.weights = weights_of(dict(self._trained()), self._before, self._first)
        self.look.rates = [rates_of(group) for group in self._optimizer.param_groups]
        # A gradient that came and was given up, as that of another loss, was not clipped.
        kept = {name: id(p) for name, p in self._trained() if p.grad is not None and id(p) in self._unclipped}
        if self._unclipped and not kept:
            self.look.clipped = 0.0
        if kept:
            came = dict(zip(kept, read([self._unclipped[i] for i in kept.values()]), strict=True))
            left = {w.path: w.grad_norm or 0.0 for w in self.look.weights if w.path in kept}
            arrived = math.hypot(*came.values())
            self.look.clipped = math.hypot(*left.values()) / arrived if arrived > 0 else None
            shares = [left[name] / norm for name, norm in came.items() if norm > 0]
            self.look.evenly = not shares or max(shares) - min(shares) <= 0.01 * max(shares)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)


def compiled(module: nn.Module) -> bool:
    """Whether torch.compile has made one graph of a module, inside of which hooks would be left out or cut it up."""
    return getattr(module, "_compiled_call_impl", None) is not None


def fused(model: nn.Module) -> bool:
    """Whether torch.compile has made one graph of the whole model: none of its layers can be seen."""
    inner = list(model.children())
    return bool(inner) and all(module is model for _, module in open_modules(model))


def open_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all modules that are in no compiled graph."""
    closed: set[int] = set()
    for path, module in model.named_modules():
        if compiled(module) or (hasattr(module, "_orig_mod") and hasattr(module, "dynamo_ctx")):
            closed |= {id(m) for m in module.modules() if m is not module or compiled(module)}
        if id(module) not in closed:
            yield path, module


def scores_of(output: object) -> Tensor | None:
    """The scores in what a model returns: the tensor, or the first in a tuple or a mapping."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return next((x for x in items if isinstance(x, Tensor) and x.is_floating_point()), None)


def probabilities(scores: Tensor) -> bool:
    """Whether the rows of (N, K) are probabilities already: in [0, 1] with sum 1."""
    if scores.ndim != 2 or scores.shape[1] < 2:
        return False
    rows = scores.detach().float()
    return bool((rows >= 0).all() & ((rows.sum(1) - 1).abs() < 0.01).all())


def takes_probabilities(look: Look, scores: Tensor, y: Tensor, loss: float) -> bool | None:
    """Whether `loss` is the cross-entropy of probabilities (N, K) as if they were scores; None where it is unknown."""
    if not look.probabilities or scores.ndim != 2 or len(scores) != len(y) or y.ndim != 1:
        return None
    if not 0 <= int(y.min()) <= int(y.max()) < scores.shape[1]:
        return None
    twice = float(F.cross_entropy(scores.float(), y.to(scores.device)))
    return abs(twice - loss) <= 0.02 * abs(twice)


def rates_of(group: dict[str, Any]) -> tuple[float, float, float]:
    """(learning rate, momentum, weight decay) of a parameter group; Adam's first beta counts as momentum."""
    momentum = group.get("momentum") or (group.get("betas") or [0.0])[0]
    return float(group.get("lr") or 0.0), float(momentum), float(group.get("weight_decay") or 0.0)

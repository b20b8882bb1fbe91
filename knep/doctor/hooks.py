"""Hooks that read one training step, put on before it and taken off behind it: the steps between cost nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from knep.doctor.readings import Look, Values, layer_of, norm_gap, weight_of

_MOST_CALLS = 400  # of modules in a forward


class Eye:
    """Reads the next step of `model` and `optimizer` until it is closed; of forwards, the first one with gradient.

    first: whether rows of the weights are compared, which the first looks alone have a use for.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, step: int, first: bool) -> None:
        self.look = Look(step)
        self.stepped = False
        self.scores: Tensor | None = None
        self._model, self._optimizer, self._first = model, optimizer, first
        self._seen, self._running = False, False
        self._last: Tensor | None = None
        self._unclipped: dict[int, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._weighted = self._data = 0
        self._handles = list(self._install())

    def _install(self) -> Iterator[Any]:
        yield self._model.register_forward_pre_hook(self._begin)
        yield self._model.register_forward_hook(self._end)
        for path, module in self._model.named_modules():
            if path and not any(True for _ in module.children()):
                yield module.register_forward_hook(functools.partial(self._passed, path))
        for p in self._model.parameters():
            if p.requires_grad and p.is_leaf:
                yield p.register_post_accumulate_grad_hook(self._arrived)
        yield self._optimizer.register_step_pre_hook(self._before_step)
        yield self._optimizer.register_step_post_hook(self._after_step)

    def close(self) -> Look:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._before, self._unclipped, self._last = {}, {}, None
        return self.look

    def _open(self) -> bool:
        return not self._seen and torch.is_grad_enabled() and len(self.look.layers) < _MOST_CALLS

    def _begin(self, module: nn.Module, args: Any) -> None:
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if self._open() and first is not None and first.is_floating_point():
            self.look.input, self._data = Values.of(first), first.data_ptr()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open():
            return
        scores = scores_of(output)
        if not self.look.layers and scores is not None and scores.ndim > 1:
            self._passed("model", module, args, output)  # a single layer, or one that only hooks of its own run
        if scores is not None:
            self.scores = scores.detach()
            self.look.output = Values.of(scores)
            self.look.probabilities = probabilities(scores)
            self.look.classes = scores.shape[1] if scores.ndim == 2 else 0
        self._seen = True

    def _passed(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._open() and isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            with torch.no_grad():
                self._read(path, module, args, output)

    def _read(self, path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        given = next((a for a in args if isinstance(a, Tensor)), None)
        if any(output is a for a in args) and not getattr(module, "inplace", False):
            return  # an empty place
        if given is not None and given.is_floating_point() and isinstance(getattr(module, "weight", None), Tensor):
            self._entered(path, module, given)
        layer = layer_of(path, module, output)
        if isinstance(module, _BatchNorm) and given is not None:
            layer.norm = norm_gap(module, given)
        self.look.layers.append(layer)
        self._last = output
        if output.requires_grad:
            output.register_hook(lambda grad: setattr(layer, "grad_std", float(grad.detach().float().std())))

    def _entered(self, path: str, module: nn.Module, given: Tensor) -> None:
        """What a layer with weights is given: the first one's scale, and the work of a function such as F.relu."""
        if not self._weighted:
            same = self.look.input is not None and given.data_ptr() == self._data
            self.look.first = self.look.input if same else Values.of(given)
            self.look.first_kind = type(module).__name__
        elif given is not self._last and given.ndim > 1 and self.look.layers[-1].dead is None and _rectified(given):
            self.look.layers.append(layer_of(f"input of {path}", nn.Identity(), given, rectified=True))
        self._weighted += 1

    def _arrived(self, p: Tensor) -> None:
        if p.grad is not None:
            self._unclipped[id(p)] = p.grad.detach().norm(dtype=torch.float32)

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        if not self.stepped:
            self._before = {
                name: p.detach().clone()
                for name, p in self._model.named_parameters()
                if p.requires_grad and (p.ndim > 1 or p.dtype in (torch.float16, torch.bfloat16))
            }

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if self.stepped:
            return
        self.stepped = True
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        self.look.weights = [weight_of(name, p, self._before.get(name), self._first) for name, p in named]
        self.look.rates = [rates_of(group) for group in self._optimizer.param_groups]
        if self._unclipped:
            arrived = float(torch.stack(list(self._unclipped.values())).norm())
            self.look.clipped = self.look.grad_norm / arrived if arrived > 0 else None


def scores_of(output: Any) -> Tensor | None:
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
    return bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 0.01).all())


def _rectified(t: Tensor) -> bool:
    """Whether values look like those behind a rectifier: none below 0, many at it."""
    values = t.detach()[:8]
    return bool((values >= 0).all()) and float((values == 0).float().mean()) > 0.05


def rates_of(group: dict[str, Any]) -> tuple[float, float, float]:
    """(learning rate, momentum, weight decay) of a parameter group; Adam's first beta counts as momentum."""
    momentum = group.get("momentum") or (group.get("betas") or [0.0])[0]
    return float(group.get("lr") or 0.0), float(momentum), float(group.get("weight_decay") or 0.0)

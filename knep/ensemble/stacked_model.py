"""One model that computes what N do: the members' batches lie behind one another, (N B, ...), member by member.

What treats each image by itself (activations, pooling, a residual addition, flattening) needs no change. Layers with
weights, batch statistics or random draws are exchanged: linear layers, convolutions and batch norm by one kernel for
all members, any other by the members' own layers, each on its share. Parameters are stacked, (N, ...), and those of the
members become views of them, so that a member's own model is up to date at any time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from knep.ensemble.rng_streams import Draws
from knep.nn.kinds import ACTIVATIONS, GATES
from knep.nn.norm import BatchNorm
from knep.nn.place import Place, ZeroGain
from knep.surgery.edit import cut

Stack = dict[str, nn.Parameter]

# Act on each image alone, without weights and draws.
_ALONE = (
    *(kind for kind in (*ACTIVATIONS, *GATES) if kind not in (nn.PReLU, nn.RReLU)),
    nn.Identity, Place, ZeroGain, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNorm)
# Weights of a layer from which on a CPU multiplies faster member by member. Measured in bfloat16 with 8 members and a
# batch of 64: 784 x 256 takes 2.2 ms against 4.1 ms at once, forward and backward; 256 x 256 the same, 256 x 10 0.6 ms
# against 0.2 ms.
_LARGE = 100_000
# What a model says when it is given a signal that it was not made for.
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)


def stacked(models: Sequence[nn.Module]) -> Stack:
    """Name -> the parameters of that name, (N, ...); the models' own become views of them."""
    owners = [dict(model.named_parameters()) for model in models]
    stack = {}
    for name, first in owners[0].items():
        stack[name] = nn.Parameter(torch.stack([o[name].data for o in owners]), requires_grad=first.requires_grad)
        for i, owner in enumerate(owners):
            owner[name].data = stack[name].data[i]
    return stack


def same_shape(models: Sequence[nn.Module]) -> bool:
    """Whether the models have the same layers with parameters of the same names and shapes."""

    def outline(model: nn.Module) -> list[tuple]:
        layers = [(path, type(m).__name__) for path, m in model.named_modules()]
        return [*layers, *((name, p.shape, p.requires_grad) for name, p in model.named_parameters())]

    shared = any(len(list(m.named_parameters(remove_duplicate=False))) > len(list(m.parameters())) for m in models[:1])
    return not shared and all(outline(m) == outline(models[0]) for m in models)


class Linear(nn.Module):
    """(N B, ..., in) to (N B, ..., out) by weights (N, out, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._held = (weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._held
        if x.device.type == "cpu" and weight[0].numel() > _LARGE:
            biases = [None] * len(weight) if bias is None else bias.unbind()
            parts = zip(x.chunk(len(weight)), weight.unbind(), biases, strict=True)
            return torch.cat([F.linear(part, w, b) for part, w, b in parts])
        signal = x.reshape(len(weight), -1, x.shape[-1])
        w = weight.transpose(1, 2)
        y = torch.bmm(signal, w) if bias is None else torch.baddbmm(bias[:, None], signal, w)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _beside(x: Tensor, members: int) -> Tensor:
    """(N B, C, ...) to (B, N C, ...): the members' channels side by side."""
    split = x.unflatten(0, (members, -1)).transpose(0, 1)
    return split.reshape(split.shape[0], -1, *x.shape[2:])


def _behind(x: Tensor, members: int) -> Tensor:
    """(B, N C, ...) to (N B, C, ...)."""
    return x.unflatten(1, (members, -1)).transpose(0, 1).flatten(0, 1)


class Conv2d(nn.Module):
    """(N B, in, H, W) to (N B, out, H', W') by weights (N, out, in / groups, kh, kw), as one grouped convolution."""

    def __init__(self, like: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._held = (weight, bias)
        self._options = {"stride": like.stride, "padding": like.padding, "dilation": like.dilation}
        self._groups = like.groups

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._held
        members = len(weight)
        flat = None if bias is None else bias.flatten()
        y = F.conv2d(_beside(x, members), weight.flatten(0, 1), flat, groups=members * self._groups, **self._options)
        return _behind(y, members)


class BatchNormalize(nn.Module):
    """Batch norm of (N B, C, ...) with the statistics of each member's own batch; its buffers are the layers'."""

    def __init__(self, layers: Sequence[_BatchNorm], weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self._held = (weight, bias)
        self._layers = tuple(layers)
        self._buffers_of = {name: torch.stack([getattr(m, name) for m in layers]) for name, _ in _kept(layers[0])}
        for name, values in self._buffers_of.items():
            for i, layer in enumerate(layers):
                setattr(layer, name, values[i])

    def forward(self, x: Tensor) -> Tensor:
        like, kept, members = self._layers[0], self._buffers_of, len(self._layers)
        weight, bias = (None if t is None else t.flatten() for t in self._held)
        mean, var = (kept[n].view(-1) if n in kept else None for n in ("running_mean", "running_var"))
        batch = like.training or mean is None
        if like.training and "num_batches_tracked" in kept:
            kept["num_batches_tracked"].add_(1)
        y = F.batch_norm(_beside(x, members), mean, var, weight, bias, batch, like.momentum or 0.0, like.eps)
        return _behind(y, members)


def _kept(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, b) for name, b in layer.named_buffers(recurse=False) if b is not None]


class Each(nn.Module):
    """The members' own layers, each on its share of the signal and with its own draws."""

    def __init__(self, layers: Sequence[nn.Module], weights: Stack, draws: Draws) -> None:
        super().__init__()
        self._layers, self._weights, self._draws = tuple(layers), weights, draws

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: p.unbind() for name, p in self._weights.items()}
        parts = []
        for i, (layer, part) in enumerate(zip(self._layers, x.chunk(len(self._layers)), strict=True)):
            with self._draws.of(i):
                own = {name: values[i] for name, values in weights.items()}
                parts.append(functional_call(layer, own, (part,)) if own else layer(part))
        return torch.cat(parts)


def fold(models: Sequence[nn.Module], stack: Stack, draws: Draws) -> nn.Module:
    """The model of all members: (N B, ...) to (N B, classes). stack: as `stacked` gave it."""
    layers = [dict(model.named_modules()) for model in models]
    done: dict[str, nn.Module] = {}

    def visit(path: str, module: nn.Module) -> nn.Module:
        own = {n.removeprefix(f"{path}.") if path else n: p for n, p in stack.items() if _inside(n, path)}
        plain = not any(True for _ in module.parameters(recurse=False)) and not _kept(module)
        if type(module) in _ALONE:
            return module
        if plain and any(True for _ in module.children()):
            for name, child in module.named_children():
                module.add_module(name, visit(f"{path}.{name}" if path else name, child))
            return module
        return done.setdefault(path, _exchanged([m[path] for m in layers], own, draws))

    return visit("", copy.deepcopy(models[0], cut(models[0])))


def _inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _exchanged(layers: Sequence[nn.Module], own: Stack, draws: Draws) -> nn.Module:
    first = layers[0]
    weight, bias = own.get("weight"), own.get("bias")
    if type(first) is nn.Linear and weight is not None:
        return Linear(weight, bias)
    if type(first) is nn.Conv2d and weight is not None and first.padding_mode == "zeros":
        return Conv2d(first, weight, bias)
    if type(first) in _BATCH_NORMS and isinstance(first, _BatchNorm) and first.momentum is not None:
        return BatchNormalize([m for m in layers if isinstance(m, _BatchNorm)], weight, bias)
    return Each(layers, own, draws)


def computes_the_same(folded: nn.Module, models: Sequence[nn.Module], x: Tensor, draws: Draws) -> bool:
    """Whether `folded` gives in training what the members give alone, on variations of images x (B, C, H, W).

    A model whose forward mixes images or draws by itself does not. Buffers and generators are as before.
    """
    buffers = [(b, b.clone()) for model in models for b in model.buffers()]
    views = [x.roll(i, 0) * (1 + i / len(models)) for i in range(len(models))]  # no two batches have the same mean
    devices = [] if x.device.type == "cpu" else [x.device]
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            for i in range(len(models)):
                draws.seed(i, i)
            got = folded(torch.cat(views)).chunk(len(models))
            for i in range(len(models)):
                draws.seed(i, i)
            want = []
            for i, (model, view) in enumerate(zip(models, views, strict=True)):
                with draws.of(i):
                    want.append(model(view))
            return all(_close(a, b) for a, b in zip(got, want, strict=True))
        except _REFUSALS:
            return False
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().max())
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)

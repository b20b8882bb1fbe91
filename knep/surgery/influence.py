"""What a changed model lets through that the model did not: later positions to earlier ones, rows of a batch to others.

Found on the sample, on copies: one half of an axis of the input is exchanged, and it is seen whether the other half of
what the watched modules and the model give moves, along each axis as long. A model is causal along an axis whose later
half moves no earlier one in the output, and whose earlier half moves a later one. Its rows are the first axis whose
halves do not move each other.

All-zero weights are drawn first, since a branch or head that begins at zero would hide what passes through it, and
numbers have 64 bits where the model runs so, since a deep net at its start passes little on. The random generators, and
so dropout's masks, are in the same state for each pass. What does not move at all tells nothing.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from knep.surgery.record import hooked, mode
from knep.surgery.sample import Inputs, call, like, mapped, rows, sampled, tensors

# Images and position tables need no more rows to show what mixes them.
_ROWS = 4
_OUTPUT = ""


class Pair(NamedTuple):
    """An axis of an input (its place among the sample's tensors, the axis) and an axis of what a module gives."""

    place: int
    axis: int
    path: str
    call: int
    seen: int


class Leak(NamedTuple):
    """Where something passes that did not: the module's path, and whether it is later positions, or else other rows."""

    path: str
    later: bool


class Influence:
    """What passes in a model, before a change: `leak` compares another model, which has the same paths.

    model: a copy that may be changed; paths: the modules to be watched, besides the output.
    """

    def __init__(self, model: nn.Module, sample: Inputs, paths: Iterable[str]) -> None:
        self._paths = list(dict.fromkeys(paths))
        self._sample = _wide(like(model, rows(sample, _ROWS)))
        precise = copy.deepcopy(model).double()
        self._precise = self._run(precise, False, like(precise, self._sample)) is not None
        self._prepare(model)
        self._sample = like(model, self._sample)
        self._axes = [
            (place, axis)
            for place, tensor in enumerate(tensors(self._sample))
            for axis in _worth(tensor)
            if tensor.shape[axis] > 1
        ]
        later = self._passes(model, False, self._axes, True)
        held = {axis: {pair for pair, moved in found.items() if not moved} for axis, found in later.items()}
        earlier = self._passes(model, False, [axis for axis, pairs in held.items() if pairs], False)
        self._rows = self._find_rows(held, earlier)
        asked = {axis for axis, found in earlier.items() if any(found.get(pair) for pair in held[axis])}
        causal = {axis: held[axis] for axis in asked if self._is_causal(later[axis], earlier[axis])}
        self._held: dict[bool, set[Pair]] = {False: {pair for pairs in causal.values() for pair in pairs}}
        trained = self._passes(model, True, list(causal), True) if causal else {}
        self._held[True] = {pair for axis in trained for pair, moved in trained[axis].items() if not moved}

    def leak(self, model: nn.Module) -> Leak | None:
        """The first place where `model` lets something through that had not passed; None where there is none."""
        self._prepare(model)
        for training in (False, True):
            kept = self._held[training] | (set() if training else self._rows)
            axes = [axis for axis in self._axes if any(axis == (pair.place, pair.axis) for pair in kept)]
            for found in self._passes(model, training, axes, True).values():
                for pair, moved in found.items():
                    if moved and pair in kept:
                        return Leak(pair.path, pair in self._held[training])
        return None

    def _prepare(self, model: nn.Module) -> None:
        if self._precise:
            model.double()
        _draw_zeros(model)

    def _find_rows(self, held: dict[Any, set[Pair]], earlier: dict[Any, dict[Pair, bool]]) -> set[Pair]:
        """The pairs of the first axis whose halves do not reach each other in the output, if it has that axis."""
        for axis, found in earlier.items():
            apart = {pair for pair in held[axis] if pair in found and not found[pair]}
            if any(pair.path == _OUTPUT for pair in apart):
                return apart
        return set()

    def _is_causal(self, later: dict[Pair, bool], earlier: dict[Pair, bool]) -> bool:
        """Whether along one axis of what is given, at every place that has it, the later half moves no earlier one."""
        one_way = {pair for pair, moved in later.items() if not moved and earlier.get(pair)}
        outputs = [pair for pair in later if pair.path == _OUTPUT]
        back = [pair for pair in outputs if later[pair] and any(pair.seen == other.seen for other in one_way)]
        return bool(one_way) and not back

    def _passes(
        self, model: nn.Module, training: bool, axes: list[tuple[int, int]], later: bool
    ) -> dict[tuple[int, int], dict[Pair, bool]]:
        """Axis -> pair -> whether the exchanged half of the input moved the other half of what is given.

        Left out are pairs where it did not even move its own half.
        """
        if not axes:
            return {}
        found: dict[tuple[int, int], dict[Pair, bool]] = {}
        base = self._run(model, training, self._sample)
        again = self._run(model, training, self._sample) if base is not None else None
        if base is None or again is None or any(_moved(a, b) for a, b in zip(base, again, strict=False)):
            return {}  # it does not run on this alone, as a detection net in training; or is random in its own way
        for place, axis in axes:
            tensor = tensors(self._sample)[place]
            middle, length = tensor.shape[axis] // 2, tensor.shape[axis]
            other = _exchanged(tensor, axis, slice(middle, None) if later else slice(0, middle))
            signals = self._run(model, training, _with(self._sample, place, other))
            if signals is None or [(p, i, t.shape) for p, i, t in signals] != [(p, i, t.shape) for p, i, t in base]:
                continue
            pairs: dict[Pair, bool] = {}
            for one, two in zip(base, signals, strict=True):
                for seen in (n for n, size in enumerate(one[2].shape) if size == length):
                    halves = slice(0, middle), slice(middle, None)
                    moved = [_moved(one, two, seen, half) for half in halves]
                    if moved[later]:
                        pairs[Pair(place, axis, one[0], one[1], seen)] = moved[not later]
            found[place, axis] = pairs
        return found

    def _run(self, model: nn.Module, training: bool, sample: Inputs) -> list[tuple[str, int, Tensor]] | None:
        """(path, number, what it gave) of every call of the watched modules and of the output; None if it fails."""
        signals: list[tuple[str, int, Tensor]] = []
        names = {model.get_submodule(path): path for path in self._paths}

        def note(path: str, output: Any) -> None:
            leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
            signals.extend((path, len(signals), t.detach().clone()) for t in leaves)

        try:
            with torch.no_grad(), _unmoved(model), mode(model, training):
                with hooked(names, leave=lambda module, args, output: note(names[module], output)):
                    output = call(model, sample)
                note(_OUTPUT, output if not hasattr(output, "to_tuple") else output.to_tuple())
        except Exception:  # another's forward may raise anything on values that it was not made for
            return None
        return signals


@contextmanager
def _unmoved(model: nn.Module) -> Iterator[None]:
    """Keeps buffers and random generators as they are, and lets each pass begin from the same numbers."""
    buffers = {b: b.clone() for b in model.buffers()}
    devices = {t.device.index for t in (*model.parameters(), *buffers) if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            torch.manual_seed(0)
            yield
    finally:
        for buffer, value in buffers.items():
            buffer.data.copy_(value)


def _draw_zeros(model: nn.Module) -> None:
    """Gives every all-zero parameter small values: a LoRA's B, a zero convolution, a gain of 0."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.is_floating_point() and p.numel() and not p.detach().any():
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def _wide(sample: Inputs) -> Inputs:
    """A tensor of one row twice."""
    found = sampled(sample)
    if isinstance(found.value, Tensor) and not found.whole and len(found.value) == 1:
        return replace(found, value=torch.cat([found.value, found.value]))
    return sample


def _worth(tensor: Tensor) -> list[int]:
    """The axes that may be rows or positions: all of a table or sequence; of images and volumes rows and the third."""
    if tensor.dtype == torch.bool or tensor.is_complex():
        return []
    return list(range(tensor.dim())) if tensor.dim() <= 3 else [0, 2]


def _exchanged(tensor: Tensor, axis: int, half: slice) -> Tensor:
    """The tensor with other values in one half of an axis: new ones, or, of whole numbers, others that it has."""
    other = tensor.clone()
    where = [slice(None)] * tensor.dim()
    where[axis] = half
    part = tensor[tuple(where)]
    if tensor.is_floating_point():
        noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(2)).to(part)
        spread = float(tensor.float().std()) if tensor.numel() > 1 else 1.0
        other[tuple(where)] = part.flip(axis) + noise * (spread or 1.0)
        return other
    values = torch.unique(tensor)
    if len(values) == 1:
        other[tuple(where)] = part - 1 if int(values[0]) > 0 else part + 1
    else:
        other[tuple(where)] = values[(torch.searchsorted(values, part.contiguous()) + 1) % len(values)]
    return other


def _with(sample: Inputs, place: int, tensor: Tensor) -> Inputs:
    """The sample with another tensor at a place among its tensors."""
    count = iter(range(len(tensors(sample))))
    return mapped(sample, lambda old: tensor if next(count) == place else old)


def _moved(
    one: tuple[str, int, Tensor], two: tuple[str, int, Tensor], axis: int = 0, half: slice | None = None
) -> bool:
    """Whether two signals differ by more than rounding, in that half of an axis."""
    a, b = one[2], two[2]
    if a.shape != b.shape:
        return True
    if half is not None:
        where = [slice(None)] * a.dim()
        where[axis] = half
        a, b = a[tuple(where)], b[tuple(where)]
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    scale = float(one[2].double().nan_to_num().abs().max()) if one[2].numel() else 0.0
    return bool(a.numel()) and float((a - b).abs().max()) > 64 * torch.finfo(one[2].dtype).eps * scale

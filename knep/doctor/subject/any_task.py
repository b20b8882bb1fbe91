"""A subject of any task: a model, batches and loss as they are given, and how they go together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.doctor.subject.any_batch import TARGETS, WEIGHTS, first, mapped, row_axis, taken, tensors
from knep.doctor.subject.copies import copied
from knep.errors import InputError

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[..., Tensor]
TASKS = ("multiclass", "binary", "multilabel", "regression", "segmentation", "tokens", "tagging", "other")


@dataclass(frozen=True)
class Subject:
    """Nothing of it is changed; `model` is a copy.

    train, val: batches as the loaders gave them; loss: f(output, target), None for the task's own or the model's;
    make_optimizer: from a copy of the model; read: (predictions, targets) in one unit of an output and a target, where
    the loss has another; loaders: as they were given, for a second look; given: the model's own
    parameters by id, before the copy, and the optimizer, where one was given; task: of `TASKS`; steps: of an
    epoch; guessed_length: whether nobody said how many epochs the run has.
    """

    model: nn.Module
    train: Sequence[Any]
    val: Sequence[Any]
    make_optimizer: Callable[[nn.Module], Optimizer]
    loss: Loss | None = None
    run_forward: Forward | None = None
    read: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None
    asked: str | None = None
    loaders: tuple[Any, Any] = (None, None)
    given: Mapping[int, str] = field(default_factory=dict)
    optimizer: Optimizer | None = None
    epochs: int = 10
    guessed_length: bool = True
    steps: int = 1
    whole: bool = True
    eval_given: bool = False
    seed: int = 0

    def parts(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, target) of a batch; the target is a tuple where the loss takes several parts."""
        if isinstance(batch, Mapping):
            names = [k for k in batch if k in TARGETS]
            inputs = {k: v for k, v in batch.items() if k not in names}
            return inputs, batch[names[0]] if len(names) == 1 else {k: batch[k] for k in names}
        if isinstance(batch, Tensor):
            return batch, batch
        if not isinstance(batch, (tuple, list)) or not batch:
            raise InputError(f"a batch is {type(batch).__name__}: give tensors, tuples or dicts of them, and forward=")
        if len(batch) == 1:
            return batch[0], batch[0]
        count = 1 if len(batch) == 2 else min(self._inputs, len(batch) - 1)
        inputs = batch[0] if count == 1 else tuple(batch[:count])
        rest = batch[count:]
        return inputs, rest[0] if len(rest) == 1 or self._loss_takes < 3 else tuple(rest)

    def answer(self, model: nn.Module, batch: Any) -> Any:
        """What the model gives for a batch."""
        if self.run_forward is not None:
            return self.run_forward(model, batch)
        inputs, _ = self.parts(batch)
        if isinstance(inputs, Mapping):
            return self._by_name(model, inputs, batch)
        if isinstance(inputs, (tuple, list)) and (len(self._names(model)) >= len(inputs) > 1 or self._inputs > 1):
            return model(*inputs)
        return model(inputs)

    def _by_name(self, model: nn.Module, inputs: Mapping[str, Any], batch: Any) -> Any:
        names = self._names(model)
        known = {k: v for k, v in inputs.items() if k in names}
        if known and all(n in known for n in self._needed(model)):
            if self.loss is None and isinstance(batch, Mapping):
                known |= {k: v for k, v in batch.items() if k in TARGETS and k in names}
            return model(**known)
        only = [v for k, v in inputs.items() if isinstance(v, Tensor) and k not in WEIGHTS]
        return model(only[0]) if len(only) == 1 or len(inputs) == 1 else model(batch)

    @staticmethod
    def _names(model: nn.Module) -> list[str]:
        return [n for n, p in inspect.signature(model.forward).parameters.items() if p.kind in (0, 1, 3)]

    @staticmethod
    def _needed(model: nn.Module) -> list[str]:
        found = inspect.signature(model.forward).parameters.items()
        return [n for n, p in found if p.kind in (0, 1) and p.default is p.empty]

    @cached_property
    def _inputs(self) -> int:
        return max(1, len(self._needed(self.model)))

    @cached_property
    def _loss_takes(self) -> int:
        """Positional arguments that the loss asks for."""
        if self.loss is None:
            return 2
        call = self.loss.forward if isinstance(self.loss, nn.Module) else self.loss
        try:
            found = inspect.signature(call).parameters.values()
        except (TypeError, ValueError):
            return 2
        return sum(p.kind in (0, 1) and p.default is p.empty for p in found) or 2

    def value(self, output: Any, target: Any) -> Tensor:
        """The loss of an output, 0-dim. Raises InputError where it gives something else."""
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if self.loss is None and isinstance(own, Tensor):
            value = own
        elif self.loss is None and isinstance(output, Tensor) and not output.ndim:
            value = output  # a forward that gives the loss itself
        elif self.loss is None:
            value = usual_loss(self.task, scores(output), target)
        else:
            value = self.loss(output, *target) if type(target) is tuple else self.loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the loss gives {got}, not a tensor of one number: take its mean")
        return value.reshape(())

    def answered(self, model: nn.Module, batch: Any) -> Any:
        """`answer`. Raises InputError in one line where the model fails."""
        try:
            return self.answer(model, batch)
        except InputError:
            raise
        except Exception as error:  # another's forward may raise anything
            raise InputError(f"the model fails on a batch of {described(batch)}: {_line(error)}") from error

    def passed(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
        """(output, loss) of a batch. Raises InputError in one line where the model or the loss fails."""
        output = self.answered(model, batch)
        try:
            return output, self.value(output, self.parts(batch)[1])
        except InputError:
            raise
        except Exception as error:  # so may a loss
            got = f"{described(output)} and a target of {described(self.parts(batch)[1])}"
            raise InputError(f"the loss fails on an output of {got}: {_line(error)}") from error

    def rows(self, batch: Any) -> int:
        """How many rows a batch has."""
        inputs, target = self.parts(batch)
        found, wanted = first(inputs), first(target)
        if wanted is not None and (found is None or wanted.shape[0] in found.shape[:2]):
            return wanted.shape[0]
        return 0 if found is None else found.shape[0]

    def some(self, batch: Any, count: int) -> Any:
        """The first rows of a batch."""
        rows = self.rows(batch)
        return taken(batch, rows, torch.arange(min(count, rows)))

    def copy(self, training: bool = False) -> nn.Module:
        return copied(self.model).train(training)

    @cached_property
    def shapes(self) -> tuple[Tensor, Any]:
        """(scores, target) of the first rows, in eval mode."""
        batch = self.some(self.train[0], 16)
        with torch.no_grad():
            return scores(self.answered(self.copy(), batch)), self.parts(batch)[1]

    @cached_property
    def task(self) -> str:
        if self.asked is not None:
            return self.asked
        output, target = self.shapes
        inputs = first(self.parts(self.some(self.train[0], 16))[0])
        return guessed(output, first(target), inputs, self)

    @cached_property
    def distances(self) -> bool:
        """Whether the output may be a distance of two inputs, which is small where the target is 1, or 0."""
        given = list(tensors(self.parts(self.train[0])[0]))
        pair = self.task == "binary" and len(given) == 2 and given[0].shape == given[1].shape
        return pair and bool((self.shapes[0] >= 0).all()) and not bool((self.shapes[0] <= 1).all())

    @cached_property
    def class_axis(self) -> int | None:
        """The axis of the output along which its classes are, None for a task without."""
        output, target = self.shapes
        y = first(target)
        if self.task not in ("multiclass", "segmentation", "tokens", "tagging") or y is None or output.ndim < 2:
            return None
        if output.ndim == y.ndim + 1 and tuple(output.shape[:-1]) == tuple(y.shape) and output.ndim == 3:
            # (N, L, V), unless L is as many as V and the loss is PyTorch's, whose classes are the second.
            return 1 if tuple(output.shape[2:]) == tuple(y.shape[1:]) and isinstance(self.loss, nn.Module) else 2
        return 1

    def stacked(self, split: str, most: int = 4000) -> tuple[Tensor, Tensor] | None:
        """(first input, first target) of many rows, as float or int; None where they have no rows of one shape."""
        batches = self.train if split == "train" else self.val
        xs, ys, count = [], [], 0
        for batch in batches:
            inputs, target = self.parts(batch)
            x, y = first(inputs), first(target)
            if x is None or y is None or (xs and (x.shape[1:] != xs[0].shape[1:] or y.shape[1:] != ys[0].shape[1:])):
                return None
            axis = row_axis(x, len(y))
            if axis is None:
                return None
            xs.append(x.detach().movedim(axis, 0))
            ys.append(y.detach())
            if (axis and xs[-1].shape[1:] != xs[0].shape[1:]) or (count := count + len(y)) >= most:
                break
        return (torch.cat(xs)[:most], torch.cat(ys)[:most]) if xs else None


def scores(output: Any) -> Tensor:
    """The tensor of an output that answers: its logits, or the first one. Raises InputError without one."""
    for name in ("logits", "scores", "out", "prediction_logits"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    found = next(tensors(output), None)
    if found is None:
        raise InputError(f"the model gives {type(output).__name__} without a tensor")
    return found


def guessed(output: Tensor, y: Tensor | None, x: Tensor | None, subject: Subject) -> str:
    """The task that an output and a target suit."""
    if y is None:
        return "other"
    if not y.is_floating_point() and y.dtype != torch.bool:
        if y.ndim == 2 and y.shape[1] > 1 and output.shape == y.shape and bool(((y == 0) | (y == 1)).all()):
            return "multilabel"
        if output.numel() == y.numel():
            known = subject.stacked("train")
            return "binary" if bool(((y == 0) | (y == 1)).all()) and known is not None else "regression"
        if y.ndim == 1 or (y.ndim == 2 and y.shape[1] == 1):
            return "multiclass"
        if y.ndim == 2:
            shifted = x is not None and x.shape == y.shape and not x.is_floating_point() and x.shape[1] > 1
            return "tokens" if shifted and x is not None and _next(x, y) else "tagging"
        return "segmentation" if y.ndim == 3 or (y.ndim == 4 and y.shape[1] == 1) else "other"
    seen = subject.stacked("train")
    if output.ndim == 2 and output.shape[1] > 1 and y.ndim <= 2 and y.numel() == len(output):
        return "multiclass" if _numbers(y if seen is None else seen[1], output.shape[1]) else "regression"
    if output.numel() != y.numel() and not (y.ndim == 2 and y.shape[1] == 1):
        return "regression" if y.ndim <= 2 else "other"
    if y.ndim == 2 and y.shape[1] > 2 and bool((y >= 0).all()) and bool(((y.sum(1) - 1).abs() < 1e-4).all()):
        return "multilabel" if bool(((y == 0) | (y == 1)).all()) else "other"  # probabilities
    binary = bool(((y == 0) | (y == 1)).all()) if seen is None else bool(((seen[1] == 0) | (seen[1] == 1)).all())
    if not binary:
        return "regression"
    return "multilabel" if y.ndim == 2 and y.shape[1] > 1 else "binary"


def _numbers(y: Tensor, classes: int) -> bool:
    """Whether floats are the numbers of classes."""
    return bool(((y == y.round()) & (y >= 0) & (y < classes)).all())


def _next(x: Tensor, y: Tensor) -> bool:
    counted = y[:, :-1] >= 0
    same = (y[:, :-1] == x[:, 1:]) & counted
    return float(same.sum()) > 0.9 * max(1, int(counted.sum())) or bool(torch.equal(x, y))


def usual_loss(task: str, output: Tensor, target: Any) -> Tensor:
    """What a task minimises where nothing else is said."""
    y = target if isinstance(target, Tensor) else first(target)
    if y is None:
        raise InputError("the batches have no target: give loss=")
    if task in ("binary", "multilabel"):
        return F.binary_cross_entropy_with_logits(output, y.to(output.dtype).view_as(output))
    if task == "regression":
        return F.mse_loss(output, y.to(output.dtype))
    if task in ("tokens", "tagging") and output.ndim == 3 and tuple(output.shape[:2]) == tuple(y.shape):
        return F.cross_entropy(output.flatten(0, 1), y.flatten().long())
    if task == "segmentation" and y.ndim == 4:
        y = y[:, 0]
    return F.cross_entropy(output, y.long() if not y.is_floating_point() else y)


def described(value: Any) -> str:
    """ "float32 (64, 10) and int64 (64,)" of the tensors within."""
    found = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors(value)]
    return " and ".join(found[:3]) or type(value).__name__


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    return mapped(batch, lambda t: t.to(device))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def kept(loader: Iterable[Any], most: int, room: int = 256 * 2**20) -> tuple[list[Any], bool]:
    """(at most so many batches and bytes of a loader, which may be endless; whether that was all)."""
    seen: list[Any] = []
    iterator = iter(loader)
    while len(seen) < most and room > 0:
        try:
            batch = next(iterator)
        except StopIteration:
            return seen, True
        except Exception as error:  # a loader of another project may raise anything
            raise InputError(f"batch {len(seen)} of the loader failed: {_line(error)}") from error
        room -= sum(t.numel() * t.element_size() for t in tensors(batch))
        seen.append(batch)
    return seen, False

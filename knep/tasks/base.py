"""A task knows a batch, a loss and what is counted; it knows no model and no trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from knep.errors import InputError
from knep.tasks.metrics import Asked, collection
from knep.utils.monitors import OF_TASK

Reduction = Literal["mean", "sum", "none"]


class Weighted(NamedTuple):
    """Targets whose rows weigh differently in every loss, of training and of evaluation; metrics count each once.

    weight: (N,).
    """

    target: Tensor
    weight: Tensor


class Split(NamedTuple):
    """A batch that was taken apart already."""

    x: Tensor
    target: Any


Target = Any  # a Tensor, or `Weighted`: pyright knows no tensor by its methods behind a union
Batch = tuple[Tensor, Target]
Loss = Callable[..., Tensor]  # loss(output, target, reduction=...), as `knep.recipes.loss` has them
Keys = Sequence[str] | Callable[[Any], Any] | None


class Augment(Protocol):
    """An option of the slot `augment`; see `knep.recipes.augment`."""

    epoch: int

    def __call__(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]: ...


class Counted(NamedTuple):
    """Of some elements: the sum of their losses and their right answers, 0-dim, and how many they are."""

    loss: Tensor
    correct: Tensor
    rows: Tensor | int


class Task(Protocol):
    """How a batch is read, what is minimised and what is counted.

    name: of `knep.utils.monitors.OF_TASK`; outputs: numbers that the model gives for a row, pixel or token;
    counts_right: whether accuracy is counted of training batches too; primary: the metric that tells epochs apart and
    "min" or "max".
    """

    name: ClassVar[str]
    outputs: int
    counts_right: ClassVar[bool]
    primary: tuple[str, str]

    def split(self, batch: Any) -> Batch:
        """The model's input and the target of a batch (x, y), (x, y, weight) or a dict.

        Raises InputError for what is no such batch.
        """
        ...

    def augmented(self, x: Tensor, target: Target, augment: Augment) -> Batch:
        """A training batch as `augment` changes it; mixing makes probabilities of the target."""
        ...

    def check(self, output: Any, target: Target) -> None:
        """Looks at a first batch. Raises InputError, naming both shapes, where output and target do not fit."""
        ...

    def loss(self, output: Tensor, target: Target, reduction: Reduction = "mean") -> Tensor:
        """What is minimised: 0-dim, or a number per element."""
        ...

    def counted(self, output: Tensor, target: Target, loss: Tensor) -> Counted:
        """What is counted of a training batch. loss: of the batch, 0-dim."""
        ...

    def evaluated(self, output: Tensor, target: Target) -> Counted:
        """What is counted of a batch of evaluation; rows that only fill it up are left out."""
        ...

    def metrics(self, sync: bool = True) -> MetricCollection | None:
        """What is measured of evaluations beside loss and accuracy, by names without a split; None for nothing.

        sync: over all processes, which then must compute it together.
        """
        ...

    def answers(self, output: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Predictions and targets as the metrics take them, without what only fills up."""
        ...

    def predictions(self, output: Tensor) -> Tensor:
        """What the model says: probabilities, or numbers in their own unit."""
        ...


_INPUTS = ("x", "image", "images", "input", "inputs", "input_ids", "pixel_values")
_TARGETS = ("y", "label", "labels", "target", "targets", "mask", "masks")


def pair(batch: Any, keys: Keys = None) -> Batch:
    """(x, target) of a batch: (x, y), (x, y, weight), or a dict with the usual names or those of `keys`.

    keys: two keys of a dict, or a function from a batch to (x, y). Raises InputError for another batch.
    """
    if callable(keys):
        batch = keys(batch)
    fields = getattr(batch, "_fields", None)
    if fields is not None and keys is not None and not callable(keys):
        batch = dict(zip(fields, batch, strict=True))
    if isinstance(batch, Mapping):
        batch = _of_mapping(batch, keys)
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3) and isinstance(batch[0], Tensor):
        if len(batch) == 2:
            return batch[0], batch[1]
        if isinstance(batch[2], Tensor) and batch[2].shape == batch[0].shape[:1]:
            return batch[0], Weighted(batch[1], batch[2])
        raise InputError(
            f"the third part of a batch weighs its {len(batch[0])} rows, and is {described(batch[2])}: give a tensor "
            f"({len(batch[0])},), or batch={tuple(fields[:2]) if fields else 'lambda b: (b[0], b[1])'}"
        )
    raise InputError(
        f"a batch of {_kind(batch)} has no input and target: give (x, y), (x, y, weight) or a dict with "
        "batch=('input', 'target'), or batch=<function from a batch to (x, y)>"
    )


def _of_mapping(batch: Mapping[str, Any], keys: Any) -> tuple[Any, ...]:
    if keys is None:
        found = [[name for name in names if name in batch] for names in (_INPUTS, _TARGETS)]
        if not all(len(names) == 1 for names in found):
            raise InputError(
                f"a batch with the keys {', '.join(map(str, batch))} does not say which are input and target: name "
                "them, data.batch=[input,target] in a run, or batch=('input', 'target') for knep.LitModule"
            )
        keys = [names[0] for names in found]
    missing = [key for key in keys if key not in batch]
    if missing or len(keys) not in (2, 3):
        raise InputError(
            f"batch={tuple(keys)} names {missing[0] if missing else len(keys)}, and batches have "
            f"{', '.join(map(str, batch))}: write two of them"
        )
    return tuple(batch[key] for key in keys)


def _kind(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{len(batch)} parts ({', '.join(described(part) for part in batch[:4])})"
    return described(batch)


def described(value: Any) -> str:
    """ "float32 (64, 10)" of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def suited(target: Tensor) -> str | None:
    """The task for targets of this dtype and shape, None where there is none."""
    if target.is_floating_point():
        return "regression" if target.ndim in (1, 2) else None
    if target.dtype in (torch.bool, torch.uint8) and target.ndim == 2:
        return "multilabel"
    return {1: "multiclass", 2: "tagging", 3: "segmentation"}.get(target.ndim)


class Common:
    """What all tasks share: batches by name, weights of rows, metrics by name.

    outputs: numbers that the model gives for a row, pixel or token. loss: what is minimised, as `knep.recipes.loss` has
    it; None takes the task's own. metrics: of torchmetrics by name, beside the task's own. batch: how a batch that is
    no (x, y) is read, see `pair`. smoothing: of labels, in training alone.
    """

    name: ClassVar[str]
    counts_right: ClassVar[bool] = False
    family: ClassVar[str] = ""  # of torchmetrics' classes: Multiclass, Binary, Multilabel or none

    def __init__(
        self,
        outputs: int,
        *,
        loss: Loss | None = None,
        metrics: Asked = (),
        batch: Keys = None,
        smoothing: float = 0.0,
    ) -> None:
        self.outputs, self.function, self.keys, self.smoothing = outputs, loss, batch, smoothing
        self.asked = metrics
        of_task = OF_TASK[self.name]
        self.primary = (f"val/{of_task.primary}", of_task.mode)
        self.metrics()  # a name that is none is refused here

    def split(self, batch: Any) -> Batch:
        if type(batch) is Split or (self.keys is None and type(batch) is tuple and len(batch) == 2):
            return batch
        return pair(batch, self.keys)

    def augmented(self, x: Tensor, target: Target, augment: Augment) -> Batch:
        if isinstance(target, Weighted):
            x, changed = augment(x, target.target, self.outputs)
            if changed is not target.target:
                raise InputError(
                    "batches have weights for their rows, which augment mixes or repeats: write augment=none"
                )
            return x, target
        return augment(x, target, self.outputs)

    # What each task says of itself.

    def _own(self, output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
        """The task's own loss."""
        raise NotImplementedError

    def _aligned(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Output and target in the shapes that losses take."""
        return output, target

    def _known(self, target: Tensor) -> Tensor | None:
        """Which rows (N,) are no padding; None where single elements are left out by negative targets."""
        return None

    def _wants(self) -> str:
        """The shapes that fit."""
        raise NotImplementedError

    def _fits(self, output: Tensor, target: Tensor) -> bool:
        raise NotImplementedError

    def _instead(self, output: Tensor, target: Tensor) -> str | None:
        """What to give in the place of targets that nearly fit; None where they do not."""
        return None

    # What follows from that.

    def _minimised(self, output: Tensor, target: Tensor, reduction: str, smoothing: float) -> Tensor:
        if self.function is None:
            return self._own(output, target, reduction, smoothing)
        more: dict[str, Any] = {"label_smoothing": smoothing} if smoothing else {}
        return self.function(output, target, reduction=reduction, **more)

    def loss(self, output: Tensor, target: Target, reduction: Reduction = "mean") -> Tensor:
        if isinstance(target, Weighted):
            output, of_row = self._aligned(output, target.target)
            values = self._minimised(output, of_row, "none", self.smoothing)
            weighted = _of_rows(values, of_row) * target.weight.to(values.dtype)
            return weighted if reduction == "none" else getattr(weighted, reduction)()
        return self._minimised(*self._aligned(output, target), reduction, self.smoothing)

    def counted(self, output: Tensor, target: Target, loss: Tensor) -> Counted:
        """The mean over known elements, times their number."""
        target = target.target if isinstance(target, Weighted) else target
        output, target = self._aligned(output, target)
        if target.is_floating_point():
            rows: Tensor | int = target.shape[0]
        else:
            rows = (target >= 0).sum()
        right = self.right(output, target).sum() if self.counts_right else torch.zeros_like(loss)
        return Counted(loss * rows, right, rows)

    def right(self, output: Tensor, target: Tensor) -> Tensor:
        """Which elements are answered rightly, bool; output and target as losses take them."""
        raise NotImplementedError

    def evaluated(self, output: Tensor, target: Target) -> Counted:
        """The unsmoothed loss by the rows' weights, summed in float64, and the number of elements that it is of."""
        weight = self._weight(target)
        output, target = self.real(output, target)
        if not len(target):
            return Counted(output.new_zeros((), dtype=torch.float64), output.new_zeros(()), 0)
        values = self._minimised(output.double(), target.double() if target.is_floating_point() else target, "none", 0)
        whole = target.is_floating_point() or values.ndim < target.ndim
        rows: Tensor | int = values.numel() if whole else (target >= 0).sum()
        right = self.right(output, target).sum() if self.counts_right else torch.zeros_like(values[:1]).sum()
        return Counted(weighted_sum(values, weight), right, rows)

    def _weight(self, target: Target) -> Tensor | None:
        """Of the rows that are no padding, (M,); None where all are alike."""
        if not isinstance(target, Weighted):
            return None
        known = self._known(target.target)
        return target.weight if known is None else target.weight[known]

    def real(self, output: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Aligned, without rows that only fill up a batch."""
        target = target.target if isinstance(target, Weighted) else target
        known = self._known(target)
        if known is not None and not known.all():
            output, target = output[known], target[known]
        return self._aligned(output, target)

    def metrics(self, sync: bool = True) -> MetricCollection | None:
        of_task = OF_TASK[self.name].names
        own = [n for n in of_task if n != "loss" and not (n == "acc" and self.counts_right)]
        named = [e for e in _listed(self.asked) if e not in of_task]
        return collection([*own, *named], self.family, self.outputs, sync)

    def predictions(self, output: Tensor) -> Tensor:
        raise NotImplementedError

    def answers(self, output: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        output, target = self.real(output, target)
        return self.predictions(output.float()), target.long()

    def check(self, output: Any, target: Target) -> None:
        if isinstance(target, Weighted):
            target = target.target
        if isinstance(output, Tensor) and isinstance(target, Tensor) and self._fits(output, target):
            self._check_values(output, target)
            return
        other = suited(target) if isinstance(target, Tensor) else None
        alike = {self.name, "tokens" if self.name == "tagging" else "", "tagging" if self.name == "tokens" else ""}
        if self.name == "binary":
            alike |= {"multiclass", "regression"}
        if other == "tagging" and isinstance(output, Tensor) and output.ndim < 3:  # which has no scores for each place
            other = None
        near = self._instead(output, target) if isinstance(output, Tensor) and isinstance(target, Tensor) else None
        remedy = near or (f"write task={other}" if other and other not in alike else self._wants())
        raise InputError(
            f"task={self.name}: the model gives {described(output)} and targets are {described(target)}, which do not "
            f"fit: {remedy}"
        )

    def _check_values(self, output: Tensor, target: Tensor) -> None:
        """Raises InputError for targets that are out of range."""

    def check_yes_or_no(self, target: Tensor) -> None:
        odd = target[(target != 0) & (target != 1)]
        if len(odd):
            raise InputError(
                f"task={self.name}: targets {described(target)} have a value {odd[0].item():g}: each must be 0 or 1"
            )

    def check_classes(self, target: Tensor, classes: int) -> None:
        """Of targets that are numbers of classes, negative where they are left out."""
        most = int(target.max()) if target.numel() else 0
        if most >= classes:
            raise InputError(
                f"task={self.name}: targets {described(target)} have a class {most}, and the model gives scores for "
                f"{classes}: classes go from 0 to {classes - 1}"
            )


def weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """The sum of values (N, ...), each times the weight (N,) of its row."""
    if weight is None:
        return values.sum()
    return (values.flatten(1).sum(1) if values.ndim > 1 else values) @ weight.to(values)


def part(target: Target, rows: Tensor | slice) -> Target:
    """Some rows of targets, with their weights; rows: bool or int64 (N,), or a slice."""
    return Weighted(*(t[rows] for t in target)) if isinstance(target, Weighted) else target[rows]


def on(target: Target, device: torch.device) -> Target:
    """Targets, with their weights, on a device."""
    return Weighted(*(t.to(device) for t in target)) if isinstance(target, Weighted) else target.to(device)


def _listed(asked: Asked) -> list[Any]:
    if asked is None or asked == "none":
        return []
    # A number or true is refused, with its name, where entries are read.
    return list(asked) if isinstance(asked, (list, tuple)) else [asked]


def _of_rows(values: Tensor, target: Tensor) -> Tensor:
    """The mean of each row, (N,), over the elements that count."""
    if values.ndim == 1:
        return values
    if values.shape == target.shape and not target.is_floating_point():
        known = (target >= 0).flatten(1)
        return values.flatten(1).sum(1) / known.sum(1).clamp_min(1)
    return values.flatten(1).mean(1)


class Sums(Metric):
    """Mean loss and accuracy of an epoch so far, from sums on the device; adding never waits for it.

    `add` stands beside `update`, whose wrapper costs twice as much as the sums: 1.4 % of a small network's step.
    """

    full_state_update = False
    loss: Tensor
    correct: Tensor
    rows: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__(sync_on_compute=False)
        for name in Counted._fields:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self._whole = 0  # rows whose number is known without the device
        self.to(device)

    def add(self, counted: Counted) -> None:
        self.loss.add_(counted.loss)
        self.correct.add_(counted.correct)
        if isinstance(counted.rows, int):
            object.__setattr__(self, "_whole", self._whole + counted.rows)  # past nn.Module's slow one
        else:
            self.rows.add_(counted.rows)

    update = add

    def values(self) -> Tensor:
        """The three sums, float64 (3,)."""
        return torch.stack([self.loss, self.correct, self.rows + self._whole])

    def go_on(self, values: Tensor) -> None:
        """Adds the sums (3,) of an earlier life of the run."""
        self.add(Counted(*values.to(self.loss.device).unbind()))

    def compute(self) -> Tensor:
        """Mean loss and accuracy, float64 (2,)."""
        values = self.values()
        return values[:2] / values[2]

    def reset(self) -> None:
        super().reset()
        self._whole = 0

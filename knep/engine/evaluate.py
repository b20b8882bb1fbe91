"""Loading what a run saved, and measuring it on a split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil, log, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from knep.config.schema import TrainerConfig
from knep.data.base import ImageData
from knep.engine.calibration import BINS, calibration_error, reliability
from knep.engine.load import load_members, stored_data
from knep.errors import InputError
from knep.io.run_folder import read_again
from knep.tasks.base import Sums, Target, Weighted, on, part
from knep.tasks.classification import Classification
from knep.tasks.metrics import numbers

_SHOWN = 2000  # rows that a figure shows
_CONFUSED = 100  # classes that a table of them can show


@dataclass
class Evaluation:
    """Measured on one pass over a split: loss and accuracy (of the mean prediction where there are several models)."""

    loss: float
    acc: float
    images: int
    member_acc: list[float]
    confusion_KK: Tensor  # rows: true class, columns: predicted
    mistakes: list[Mistake] = field(default_factory=list)  # most confident first
    metrics: dict[str, float] = field(default_factory=dict)  # those that the run asked for
    bins: Tensor = field(default_factory=lambda: torch.zeros(BINS, 3))  # see `knep.engine.calibration.reliability`
    right_N: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))  # image by image, in their order

    @property
    def calibration_error(self) -> float:
        return calibration_error(self.bins)

    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval of the accuracy (Wilson 1927)."""
        z, n, p = 1.959964, self.images, self.acc
        centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


@dataclass
class Mistake:
    """An image with its true and its predicted class and the probability given to the latter."""

    image_CHW: Tensor
    true: int
    predicted: int
    probability: float


@torch.no_grad()
def evaluate(
    members: Sequence[nn.Module],
    batches: Iterable[tuple[Tensor, Target]],
    num_classes: int,
    keep: int = 16,
    mirrored: bool = False,
) -> Evaluation:
    """One pass of all members over raw batches (x, y); labels of -1 are padding and are left out.

    keep: how many of the most confident mistakes are returned; mirrored: a member's probabilities are the mean over the
    image and its mirror image.
    """
    for member in members:
        member.eval()
    own = getattr(members[0], "task", None)
    device = next(members[0].parameters()).device
    task = own if isinstance(own, Classification) else Classification(num_classes)
    metrics = task.metrics(sync=False)  # the first process alone evaluates
    metrics = metrics if metrics is None else metrics.to(device)
    confusion = MulticlassConfusionMatrix(num_classes, sync_on_compute=False).to(device)
    loss, right, each, images, mistakes = 0.0, [], [0] * len(members), 0, []
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    for x, target in batches:
        known = (target.target if isinstance(target, Weighted) else target) >= 0
        x_NCHW, kept = x[known].to(device), on(part(target, known), device)
        y_N = kept.target if isinstance(kept, Weighted) else kept
        views = (x_NCHW, x_NCHW.flip(3)) if mirrored else (x_NCHW,)
        scores_MVNK = torch.stack([torch.stack([m(view).float() for view in views]) for m in members])
        logp_MVNK = scores_MVNK.log_softmax(-1)
        p_MNK = logp_MVNK.exp().mean(1)
        p_NK = p_MNK.mean(0)
        # The mean in logarithms, which knows no smallest number.
        logp_NK = logp_MVNK.flatten(0, 1).logsumexp(0) - log(len(members) * len(views))
        confidence, predicted = p_NK.max(1)
        if task.of_scores:
            loss += task.evaluated(scores_MVNK.flatten(0, 1).mean(0), kept).loss.item()
        else:
            loss += task.of_probabilities(logp_NK, kept).item()
        right.append((predicted == y_N).cpu())
        each = [a + int((p.argmax(1) == y_N).sum()) for a, p in zip(each, p_MNK, strict=True)]
        images += len(y_N)
        confusion.update(predicted, y_N)
        bins += reliability(confidence, predicted == y_N)
        if metrics is not None and len(y_N):
            metrics.update(p_NK, y_N)
        wrong = (predicted != y_N).nonzero().flatten()
        mistakes += [
            Mistake(x_NCHW[i].cpu(), int(y_N[i]), int(predicted[i]), float(confidence[i])) for i in wrong.tolist()
        ]
        mistakes = sorted(mistakes, key=lambda m: -m.probability)[:keep]
    if not images:
        raise InputError("there is not one image to evaluate on")
    table = confusion.compute().cpu()
    found = {} if metrics is None else {k: float(v) for k, v in numbers(metrics.compute()).items()}
    right_N = torch.cat(right)
    acc, each = int(right_N.sum()) / images, [a / images for a in each]
    return Evaluation(loss / images, acc, images, each, table, mistakes, found, bins, right_N)


@dataclass
class Measured:
    """What a task measured on one pass over a split.

    numbers: "loss" and metrics, by names without the split; rows: of the split; predictions, targets: of the first
    rows, pixels or tokens, at most 2,000, as the metrics take them. confusion_KK: of all of them, rows: true class,
    columns: predicted; None where a task has no classes, or too many to draw.
    """

    numbers: dict[str, float]
    rows: int
    predictions: Tensor
    targets: Tensor
    confusion_KK: Tensor | None = None


@torch.no_grad()
def measure(member: Any, batches: Iterable[Any]) -> Measured:
    """One pass of a model of any task over batches; what only fills them up is left out.

    Raises InputError where there is not one row.
    """
    task = member.eval().task
    device = next(member.parameters()).device
    sums, metrics = Sums(device), task.metrics(sync=False)
    metrics = metrics if metrics is None else metrics.to(device)
    kept: list[tuple[Tensor, Tensor]] = []
    rows = seen = 0
    classes = _classes(task)
    counts = torch.zeros(classes**2, dtype=torch.int64, device=device)
    for batch in batches:
        x, target = task.split(batch)
        x, target = x.to(device), on(target, device)
        output = member(x)
        sums.add(task.evaluated(output, target))
        predicted, true = task.answers(output, target)
        if metrics is not None and len(true):
            metrics.update(predicted, true)
        if classes:
            chosen = (predicted > 0.5).long() if predicted.ndim == 1 else predicted.argmax(1)
            counts += torch.bincount(true * classes + chosen, minlength=classes**2)
        rows += len(x)
        if seen < _SHOWN:
            kept.append((predicted[: _SHOWN - seen].cpu(), true[: _SHOWN - seen].cpu()))
            seen += len(kept[-1][1])
    if not rows:
        raise InputError("there is not one row to evaluate on")
    loss, right, count = sums.values().tolist()
    found = {"loss": loss / max(count, 1)} | ({"acc": right / max(count, 1)} if task.counts_right else {})
    if metrics is not None:
        found |= {name: float(value) for name, value in numbers(metrics.compute()).items()}
    predictions, targets = (torch.cat(parts) for parts in zip(*kept, strict=True))
    table = counts.view(classes, classes).cpu() if classes else None
    return Measured(found, rows, predictions, targets, table)


def _classes(task: Any) -> int:
    """Of a confusion matrix; 0 where there is none."""
    if task.name == "binary":
        return 2
    return task.outputs if task.name in ("segmentation", "tagging") and task.outputs <= _CONFUSED else 0


def batches_of(trainer: TrainerConfig, data: ImageData, split: str) -> Iterable[tuple[Tensor, Target]]:
    """What a run measures of `val` or `test` at its end: all, or as much as the trainer's limits leave.

    limit_test_batches and fast_dev_run count batches of data.batch_size images, or a share of the images;
    limit_val_batches those that the validations have, which are larger. Without validation (0) all is measured.
    """
    batches = getattr(data, f"{split}_dataloader")()
    quick = int(trainer.fast_dev_run)
    limit = quick or (trainer.limit_val_batches if split == "val" else trainer.limit_test_batches)
    if not limit:
        return batches
    if split == "val" and not quick:
        return islice(batches, limit if isinstance(limit, int) else max(1, int(limit * len(batches))))
    return _first(batches, limit * _asked(data) if isinstance(limit, int) else ceil(limit * data.sizes[split]))


def _asked(data: ImageData) -> int:
    """data.batch_size as it was asked for, where training passes its batches in parts."""
    return getattr(data, "whole_batch", data.batch_size)


def _first(batches: Iterable[tuple[Tensor, Target]], images: int) -> Iterator[tuple[Tensor, Target]]:
    for x, y in batches:
        yield x[:images], part(y, slice(images))
        images -= len(x)
        if images <= 0:
            return


def retest(run: Path, split: str, mirrored: bool) -> dict[str, Any]:
    """What a finished run reaches on `val` or `test`, all of it; a look at `test` is counted in its summary.

    mirrored: also where the run had no test_flip.
    """
    members = load_members(run)
    config, data = members[0].about["config"], stored_data(members[0])
    batches = data.val_dataloader() if split == "val" else data.test_dataloader()
    if members[0].task.name != "multiclass":
        if mirrored:
            raise InputError(f"--mirrored averages classes of images, and this run is of task={members[0].task.name}")
        measured = measure(members[0], batches)
        if split == "test":
            read_again(run)
        return {f"{split}/{name}": value for name, value in (measured.numbers | {"rows": measured.rows}).items()}
    result = evaluate(members, batches, data.num_classes, mirrored=mirrored or config.get("test_flip", False))
    if split == "test":
        read_again(run)
    low, high = result.interval()
    found = {"acc": result.acc, "acc_low": low, "acc_high": high, "loss": result.loss, **result.metrics}
    found["images"] = result.images
    return {f"{split}/{name}": value for name, value in found.items()}

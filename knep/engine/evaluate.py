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
from knep.engine.load import load_members, stored_data
from knep.errors import InputError
from knep.io.run_folder import read_again
from knep.tasks.classification import Classification


@dataclass
class Evaluation:
    """Measured on one pass over a split: loss and accuracy (of the mean prediction where there are several models)."""

    loss: float
    acc: float
    images: int
    member_acc: list[float]
    confusion_KK: Tensor  # rows: true class, columns: predicted
    mistakes: list[Mistake] = field(default_factory=list)  # most confident first

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
    batches: Iterable[tuple[Tensor, Tensor]],
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
    device, task = next(members[0].parameters()).device, Classification(num_classes)
    confusion = MulticlassConfusionMatrix(num_classes, sync_on_compute=False).to(device)
    loss, right, each, images, mistakes = 0.0, 0, [0] * len(members), 0, []
    for x, y in batches:
        x_NCHW, y_N = x[y >= 0].to(device), y[y >= 0].to(device)
        views = (x_NCHW, x_NCHW.flip(3)) if mirrored else (x_NCHW,)
        logp_MVNK = torch.stack([torch.stack([m(view).float().log_softmax(1) for view in views]) for m in members])
        p_MNK = logp_MVNK.exp().mean(1)
        p_NK = p_MNK.mean(0)
        # The mean in logarithms, which knows no smallest number.
        logp_NK = logp_MVNK.flatten(0, 1).logsumexp(0) - log(len(members) * len(views))
        confidence, predicted = p_NK.max(1)
        loss += task.of_probabilities(logp_NK, y_N).item()
        right += int((predicted == y_N).sum())
        each = [a + int((p.argmax(1) == y_N).sum()) for a, p in zip(each, p_MNK, strict=True)]
        images += len(y_N)
        confusion.update(predicted, y_N)
        wrong = (predicted != y_N).nonzero().flatten()
        mistakes += [
            Mistake(x_NCHW[i].cpu(), int(y_N[i]), int(predicted[i]), float(confidence[i])) for i in wrong.tolist()
        ]
        mistakes = sorted(mistakes, key=lambda m: -m.probability)[:keep]
    if not images:
        raise InputError("there is not one image to evaluate on")
    table = confusion.compute().cpu()
    return Evaluation(loss / images, right / images, images, [a / images for a in each], table, mistakes)


def batches_of(trainer: TrainerConfig, data: ImageData, split: str) -> Iterable[tuple[Tensor, Tensor]]:
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
    return _first(batches, limit * data.batch_size if isinstance(limit, int) else ceil(limit * data.sizes[split]))


def _first(batches: Iterable[tuple[Tensor, Tensor]], images: int) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches:
        yield x[:images], y[:images]
        images -= len(y)
        if images <= 0:
            return


def retest(run: Path, split: str, mirrored: bool) -> dict[str, Any]:
    """What a finished run reaches on `val` or `test`, all of it; a look at `test` is counted in its summary.

    mirrored: also where the run had no test_flip.
    """
    members = load_members(run)
    config, data = members[0].about["config"], stored_data(members[0])
    batches = data.val_dataloader() if split == "val" else data.test_dataloader()
    result = evaluate(members, batches, data.num_classes, mirrored=mirrored or config.get("test_flip", False))
    if split == "test":
        read_again(run)
    low, high = result.interval()
    numbers = {"acc": result.acc, "acc_low": low, "acc_high": high, "loss": result.loss, "images": result.images}
    return {f"{split}/{name}": value for name, value in numbers.items()}

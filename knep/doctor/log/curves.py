"""The curves of a run that has ended, whatever file they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Series = list[tuple[float, float]]  # (step or epoch, value), in order; values may be NaN or infinite

# What a column or a tag is, by its name in lower case with / and - as _; the first that is there is taken.
NAMES: Mapping[str, tuple[str, ...]] = {
    "train": (
        *("train_loss_epoch", "train_loss", "loss_train", "training_loss", "train_loss_step", "loss_epoch", "loss"),
        *("loss_step", "train_epoch_loss", "epoch_loss", "losses_train", "batch_loss"),
    ),
    "val": (
        *("val_loss", "loss_val", "valid_loss", "validation_loss", "eval_loss", "val_loss_epoch", "dev_loss"),
        *("loss_validation", "loss_valid", "loss_eval", "losses_val", "validation_epoch_loss", "val_epoch_loss"),
        *("test_loss", "loss_test"),
    ),
    "train_acc": ("train_acc", "train_accuracy", "acc_train", "accuracy_train", "accuracy", "acc", "train_acc_epoch"),
    "val_acc": (
        *("val_acc", "val_accuracy", "acc_val", "accuracy_val", "valid_acc", "eval_accuracy", "validation_accuracy"),
        *("valid_accuracy", "test_acc", "test_accuracy"),
    ),
    "lr": ("lr", "learning_rate", "train_lr", "train_learning_rate", "lr_adam", "lr_sgd", "lr_adamw"),
    "norm": ("grad_norm", "grad_norm_before_clip", "train_grad_norm", "gradient_norm", "grad_2.0_norm_total"),
}


@dataclass(frozen=True)
class Curves:
    """unit: what the places count, "step" or "epoch"; train, val, train_acc, val_acc, lr, norm: the series, empty where
    there is none; lines: override lines of a run of knep, None of others; source: where they came from, for the eye.
    """

    unit: str = "step"
    train: Series = field(default_factory=list)
    val: Series = field(default_factory=list)
    train_acc: Series = field(default_factory=list)
    val_acc: Series = field(default_factory=list)
    lr: Series = field(default_factory=list)
    norm: Series = field(default_factory=list)
    lines: tuple[str, ...] | None = None
    source: str = ""

    @classmethod
    def of(cls, series: Mapping[str, Series], unit: str, source: str) -> Curves:
        """series: by the names of NAMES."""
        found = cls(unit=unit, source=source)
        for name, points in series.items():
            getattr(found, name).extend(points)
        return found

    @property
    def points(self) -> int:
        return len(self.train) + len(self.val)

    def as_dict(self) -> dict[str, object]:
        """Plain data for figures and JSON; what is not finite is null."""
        rows = {name: [[x, v if math.isfinite(v) else None] for x, v in getattr(self, name)] for name in NAMES}
        return {"source": self.source, "unit": self.unit, **rows}


def plain_name(name: str) -> str:
    return name.strip().lower().replace("/", "_").replace("-", "_").replace(" ", "_")


def assigned(names: Sequence[str]) -> dict[str, str]:
    """Kind of series -> the name in a file that stands for it."""
    known = {plain_name(name): name for name in reversed(names)}
    return {kind: known[w] for kind, words in NAMES.items() if (w := next((w for w in words if w in known), None))}


def values(series: Series) -> list[float]:
    return [v for _, v in series]

"""Metrics of torchmetrics by name, for a task: `f1` is MulticlassF1Score, BinaryF1Score or MultilabelF1Score."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from knep.errors import InputError

# A name, a name with values such as {"name": "fbeta", "beta": 2.0}, or several of them.
Asked = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None

# Names that the field has, by those of torchmetrics without the task's; with values that they stand for.
_SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "acc": ("accuracy", {}),
    "top5": ("accuracy", {"top_k": 5}),
    "balanced_accuracy": ("accuracy", {"average": "macro"}),
    "f1": ("f1score", {}),
    "fbeta": ("fbetascore", {}),
    "auc": ("auroc", {}),
    "map": ("averageprecision", {}),
    "iou": ("jaccardindex", {}),
    "dice": ("f1score", {}),
    "kappa": ("cohenkappa", {}),
    "mcc": ("matthewscorrcoef", {}),
    "ece": ("calibrationerror", {}),
    "hamming": ("hammingdistance", {}),
    "rmse": ("meansquarederror", {"squared": False}),
    "mse": ("meansquarederror", {}),
    "mae": ("meanabsoluteerror", {}),
    "mape": ("meanabsolutepercentageerror", {}),
    "r2": ("r2score", {}),
    "pearson": ("pearsoncorrcoef", {}),
    "spearman": ("spearmancorrcoef", {}),
    "kendall": ("kendallrankcorrcoef", {}),
}
# Of these the default is the mean over classes, where the field means the share of all right answers.
_MICRO = {"accuracy"}
# What gives a curve, a table or a pair, and no number for a log.
_NO_NUMBER = re.compile("confusionmatrix|curve$|^roc$|statscores|fixed|atspecificity|atsensitivity|fairness|group")
_WIDTH = ("num_classes", "num_labels")


class Perplexity(Metric):
    """exp of the mean of -log p_y (Jelinek et al. 1977), from probabilities (M, K); torchmetrics' takes scores."""

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, sync: bool = True) -> None:
        super().__init__(sync_on_compute=sync)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        p = preds.gather(1, target[:, None]).double()
        self.total -= p.clamp_min(1e-38).log().sum()
        self.count += len(target)

    def compute(self) -> Tensor:
        return (self.total / self.count).exp().float()


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


@lru_cache
def _classes(family: str) -> dict[str, type[Metric]]:
    """Plain name, without the task's -> class."""
    import torchmetrics.classification
    import torchmetrics.regression

    module: Any = torchmetrics.classification if family else torchmetrics.regression
    found = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, Metric)}
    return {_plain(n.removeprefix(family)): c for n, c in found.items() if n.startswith(family)}


def _entries(asked: Iterable[str | Mapping[str, Any]]) -> Iterable[tuple[str, dict[str, Any]]]:
    for entry in asked:
        if isinstance(entry, str):
            yield entry, {}
        elif isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
            yield entry["name"], {str(k): v for k, v in entry.items() if k != "name"}
        else:
            raise InputError(
                f"metrics={entry} names no metric: write metrics=[f1,auroc], or [{{name: fbeta, beta: 2}}]"
            )


def collection(
    asked: Sequence[str | Mapping[str, Any]], family: str, outputs: int, sync: bool = True
) -> MetricCollection | None:
    """The metrics that names ask for, under these names; None for none.

    family: Multiclass, Binary or Multilabel of torchmetrics.classification, or "" for its regression; sync: over all
    processes, which then must compute them together.
    Raises InputError for a name that is none, or for values that the metric does not take.
    """
    found = {name: _made(name, values, family, outputs, sync) for name, values in _entries(asked)}
    return MetricCollection(dict(found), compute_groups=False) if found else None  # type: ignore[arg-type]


def _made(name: str, values: dict[str, Any], family: str, outputs: int, sync: bool) -> Metric:
    if name == "perplexity" and family == "Multiclass" and not values:
        return Perplexity(sync)
    plain, standing = _SHORT.get(name, (_plain(name.removeprefix(family)), {}))
    classes = _classes(family)
    if plain not in classes or _NO_NUMBER.search(plain):
        known = {short for short, (long, _) in _SHORT.items() if long in classes} | set(classes)
        if plain in classes:
            raise InputError(f"metrics={name} gives a curve or a table, and what is logged is a number: leave it out")
        near = get_close_matches(name, sorted(known), n=1, cutoff=0.6)
        some = ", ".join(sorted(n for n in known if n in _SHORT))
        said = f"did you mean {near[0]}?" if near else f"write for example {some}, or a class of torchmetrics"
        raise InputError(f"there is no metric {name} for this task: {said}")
    cls = classes[plain]
    takes = inspect.signature(cls).parameters
    given: dict[str, Any] = {key: outputs for key in _WIDTH if key in takes}
    if plain.endswith("corrcoef") and "num_outputs" in takes:
        given["num_outputs"] = outputs
    if plain in _MICRO and "average" in takes:
        given["average"] = "micro"
    given |= {"sync_on_compute": sync} | standing | values
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"metrics={name}: {' '.join(str(error).split())}: change its values") from error


def numbers(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Metric -> a number; of one with several, for classes or targets, their mean."""
    return {name: value if value.ndim == 0 else value.float().mean() for name, value in values.items()}


def higher_is_better(metrics: MetricCollection | None) -> dict[str, str]:
    """Metric -> "max" or "min", for those that say it."""
    ways = {True: "max", False: "min"}
    pairs = metrics.items(keep_base=True) if metrics is not None else ()
    return {name: ways[m.higher_is_better] for name, m in pairs if m.higher_is_better in ways}

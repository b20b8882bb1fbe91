"""Metrics that stopping, averaging and schedules watch: which a run logs, and which way each should go. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from knep.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor


class Measured(NamedTuple):
    """What a task measures of a split, without a name of the split; which of it tells epochs apart, and which way."""

    names: tuple[str, ...]
    primary: str
    mode: str


OF_TASK = {
    "multiclass": Measured(("loss", "acc"), "acc", "max"),
    "binary": Measured(("loss", "acc", "auroc"), "auroc", "max"),
    "multilabel": Measured(("loss", "f1", "map"), "map", "max"),
    "regression": Measured(("loss", "rmse", "mae", "r2"), "rmse", "min"),
    "segmentation": Measured(("loss", "iou", "acc"), "iou", "max"),
    "tokens": Measured(("loss", "perplexity", "acc"), "perplexity", "min"),
    "tagging": Measured(("loss", "f1", "acc"), "f1", "max"),
}
_WATCH = ("stopping", "averaging", "scheduler")
_TRAINED = {"multiclass": ("loss", "acc"), "binary": ("loss", "acc")}  # of the others the loss alone
_RISE = {"acc", "accuracy", "top1", "top5", "f1", "auc", "auroc", "precision", "recall", "iou", "map", "r2", "kappa"}
_RISE |= {"mcc", "dice", "pearson", "spearman", "kendall", "specificity", "fbeta"}
_FALL = {"loss", "error", "err", "nll", "mse", "rmse", "mae", "perplexity", "brier", "ece", "mape", "smape", "hamming"}


def of_other_split(monitor: str) -> bool:
    """Whether a metric's name says that it is of the training or the test split, which select nothing."""
    return monitor.lower().replace("/", "_").replace("-", "_").split("_")[0] in ("train", "training", "test")


def mode_of(monitor: str) -> str | None:
    """ "max" for a metric that should rise, "min" for one that should fall, None where its name does not tell."""
    words = set(monitor.lower().replace("/", "_").replace("-", "_").split("_"))
    rises, falls = bool(words & _RISE), bool(words & _FALL)
    return None if rises == falls else "max" if rises else "min"


def refuse_contradictory_modes(config: Mapping[str, Any]) -> None:
    """Raises InputError for a slot that would keep the worst epoch of its metric."""
    for slot in ("stopping", "averaging"):
        node = config.get(slot) or {}
        monitor, mode = node.get("monitor"), node.get("mode")
        wanted = mode_of(monitor) if isinstance(monitor, str) else None
        if wanted and mode in ("min", "max") and mode != wanted:
            way = "rise" if wanted == "max" else "fall"
            raise InputError(
                f"{slot}.mode={mode} contradicts {slot}.monitor={monitor}, which should {way}: its worst epoch would "
                f"count as the best, write {slot}.mode={wanted}"
            )


def check_directions(config: Mapping[str, Any], ways: Mapping[str, str]) -> None:
    """As `refuse_contradictory_modes`, for metrics that say themselves which way they go: name -> "min" or "max"."""
    for slot in ("stopping", "averaging"):
        node = config.get(slot) or {}
        monitor = str(node.get("monitor", ""))
        wanted = ways.get(monitor.removeprefix("val/"))
        if wanted is not None and node.get("mode") not in (None, wanted):
            raise InputError(
                f"{slot}.mode={node['mode']} contradicts {slot}.monitor={monitor}, of which {wanted} is best: write "
                f"{slot}.mode={wanted}"
            )


def names_of(metrics: Any) -> list[str]:
    """The names in a list such as [f1, {name: fbeta, beta: 2}], or in one name; what else is wrong others refuse."""
    entries = metrics if isinstance(metrics, (list, tuple)) else [] if metrics in (None, "none") else [metrics]
    return [str(e.get("name") if isinstance(e, Mapping) else e) for e in entries]


def refuse_unlogged(config: Mapping[str, Any], task: str = "multiclass") -> None:
    """Raises InputError for a metric that a run does not log. task: a name of `OF_TASK`; others log what they like."""
    if task not in OF_TASK:
        return
    validated = [f"val/{name}" for name in dict.fromkeys((*OF_TASK[task].names, *names_of(config.get("metrics"))))]
    trained = [f"train/{name}" for name in _TRAINED.get(task, ("loss",))]
    for slot in _WATCH:
        node, names = config.get(slot) or {}, [*validated, *(trained if slot == "scheduler" else ())]
        if "monitor" in node and node["monitor"] not in names:
            raise InputError(
                f"{slot}.monitor={node['monitor']} is no validation metric that a run logs: write one of "
                f"{', '.join(names)}"
            )


def logged(trainer: Trainer, monitor: str) -> Tensor:
    """The last value of a metric (a 0-dim tensor). Raises InputError where no module and no callback logs it."""
    found = trainer.callback_metrics
    if monitor not in found:
        raise InputError(f"{monitor} is watched and logged by nobody: name one of {', '.join(sorted(found)) or 'none'}")
    return found[monitor]


def validation_watchers(config: Mapping[str, Any]) -> dict[str, str]:
    """Slot -> the validation metric that it watches."""
    found = {slot: (config.get(slot) or {}).get("monitor") for slot in _WATCH}
    return {slot: str(monitor) for slot, monitor in found.items() if str(monitor).startswith("val/")}


def refuse_without_validation(choices: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Raises InputError where something watches a validation and the trainer's limits leave none."""
    trainer, watchers = config["trainer"], validation_watchers(config)
    if not watchers or trainer.get("fast_dev_run"):
        return
    said = " and ".join(f"{slot}={choices[slot]}" if slot in choices else slot for slot in watchers)
    without = " ".join(f"{slot}=none" for slot in watchers)
    limit, every, epochs = (trainer.get(k) for k in ("limit_val_batches", "check_val_every_n_epoch", "max_epochs"))
    if limit is not None and limit == 0:
        raise InputError(
            f"trainer.limit_val_batches={limit} contradicts {said}, of which each needs a validation: write "
            f"{without}, or trainer.limit_val_batches=null"
        )
    if isinstance(every, int) and isinstance(epochs, int) and 0 < epochs < every:
        raise InputError(
            f"trainer.check_val_every_n_epoch={every} contradicts {said}: the run of {epochs} epochs ends before its "
            f"first validation, write trainer.check_val_every_n_epoch={epochs} or less, or {without}"
        )

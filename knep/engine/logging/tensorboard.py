"""What a run writes for TensorBoard: the curves of loss and accuracy first, and what it was as hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from knep.config.catalog import CONF
from knep.config.schema import NOT_HASHED
from knep.io.run_names import events_folder

_CURVES = ("train/", "val/")
WHOLE = "whole_run"  # sorts last, as it should: TensorBoard unfolds the first two groups alone
_SESSION = ".hparams"  # ends the file that holds them: a run that goes on writes another one


def tag(name: str) -> str:
    """Where TensorBoard shows a metric. It sorts by name: what is no curve of train/ or val/ comes behind them."""
    return name if name.startswith(_CURVES) else f"watch/{name}"


class Board(TensorBoardLogger):
    """Lightning's logger in a run's folder, with the metrics under `tag`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), name="", version=events_folder(folder), default_hp_metric=False)

    def forget_after(self, step: int) -> None:
        """Lets TensorBoard drop the points behind `step`, of an earlier life of the run."""
        self._kwargs["purge_step"] = step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # The epoch is a straight line, and the first chart of all.
        super().log_metrics({tag(k): v for k, v in metrics.items() if k != "epoch"}, step)

    @rank_zero_only
    def log_end(self, numbers: Mapping[str, float], step: int, curves: bool = True) -> None:
        """The numbers of the whole run: val/ ends its curves, with the weights that were kept; others are points.

        curves: False where val/ was measured otherwise than in training, and would end them with a jump.
        """
        for name, value in numbers.items():
            ends = curves and name.startswith("val/") and not name.endswith("_best")
            self.experiment.add_scalar(name if ends else f"{WHOLE}/{name}", value, step)

    @rank_zero_only
    def log_session(self, values: Mapping[str, Any], step: int) -> None:
        """Hyper-parameters as a row of the HParams tab.

        No list of columns goes with them: TensorBoard would take the first run's for all, and without one it takes all
        columns there are, those that differ between runs first.
        """
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for earlier in Path(self.log_dir).glob(f"*{_SESSION}"):
            earlier.unlink()
        _, start, end = hparams({k: _plain(v) for k, v in values.items()}, {})
        with SummaryWriter(self.log_dir, filename_suffix=_SESSION) as board:
            for summary in (start, end):
                board._get_file_writer().add_summary(summary, step)


def _plain(value: object) -> float | int | str:
    """A value as TensorBoard takes it, which has no null and takes text for HTML."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else escape(str(value), quote=False)


def session(config: Mapping[str, Any], choices: Mapping[str, str], lines: Sequence[str]) -> dict[str, Any]:
    """What tells one run from another: the choices, the seed, and the values that the recipe set or somebody typed.

    lines: the override lines of the run.
    """
    told = {line.partition("=")[0].lstrip("+") for line in lines} | _set_by_recipe(choices)
    values = {k: v for k, v in flat(config).items() if k in told and k.partition(".")[0] not in NOT_HASHED}
    return {**choices, "seed": config["seed"], **values}


def _set_by_recipe(choices: Mapping[str, str]) -> set[str]:
    """The keys to which a recipe of knep gives values of its own."""
    folder, name = CONF / "recipe", choices.get("recipe", "none")
    slots = {folder / name / f"{slot}-{option}.yaml": f"{slot}." for slot, option in choices.items()}
    files = {path: prefix for path, prefix in {folder / f"{name}.yaml": "", **slots}.items() if path.is_file()}
    return {key for path, prefix in files.items() for key in flat(yaml.safe_load(path.read_text("utf-8")), prefix)}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config as dotted keys with the values that are no groups of keys."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out

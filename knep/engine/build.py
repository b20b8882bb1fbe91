"""Building one model and fitting it: the part of a run that Lightning does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from knep.config.command_line.readers import own_callbacks
from knep.config.instantiate import instantiate
from knep.distributed.slurm import environment
from knep.distributed.watchdog import watch
from knep.engine.checkpointing import Best, Keeper
from knep.engine.logging.csv_logger import CsvLogger
from knep.engine.logging.progress import Lines, ProgressBar
from knep.engine.logging.tensorboard import Board
from knep.engine.loops.exact import use_exact_loops
from knep.engine.loops.interrupts import StopOnSignal
from knep.engine.loops.lean import use_lean_loop
from knep.engine.module import Classifier
from knep.engine.room import check_model
from knep.errors import InputError
from knep.io.checkpoint import WholeCheckpoints
from knep.recipes.recipe import Recipe, named
from knep.utils.hardware import fast_products, precision


class Clock(Callback):
    """Seconds and images of the training batches alone, validation and logging of epochs left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self.began = False  # whether a batch was trained on
        self._began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.began = True
        if batch_idx == 0 or not self._began:
            self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(batch[0]) * trainer.world_size
        if trainer.is_last_batch:
            self.seconds += time.perf_counter() - self._began
            self._began = 0.0

    @property
    def samples_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class History(Callback):
    """The validation metrics of every epoch, kept in the checkpoint."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self.rows.append({"epoch": trainer.current_epoch} | metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def best(self, monitor: str, mode: str) -> dict[str, float]:
        """The row of the best epoch by a validation metric."""
        sign = 1 if mode == "min" else -1
        return min(self.rows, key=lambda row: sign * row[monitor])


def about(config: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """The plain data that a checkpoint needs to be rebuilt without the data set."""
    bits = getattr(data, "bits", None)
    return ({} if bits is None else {"bits": bits}) | {
        "config": dict(config),
        "num_classes": data.num_classes,
        "channels": data.channels,
        "image_size": data.image_size,
        "class_names": list(data.class_names),
    }


def build_module(facts: Mapping[str, Any], data: Any = None, initialise: bool = True, seed: int = 0) -> Classifier:
    """The Classifier that a config describes: scaling fitted on `data`, model built, recipe applied.

    initialise: False leaves out `init` and the scaling's statistics, for weights that come from a checkpoint.
    """
    cfg = facts["config"]
    recipe = Recipe.from_config(cfg)
    if not initialise:
        recipe.model_slots = {k: v for k, v in recipe.model_slots.items() if k != "init"}
    torch.manual_seed(seed)
    shape = (1, facts["channels"], facts["image_size"], facts["image_size"])
    images = data.train_images() if data is not None else [torch.zeros(shape, dtype=torch.uint8)]
    scaling = recipe.scaling(images)
    size = {"in_channels": facts["channels"], "num_classes": facts["num_classes"], "image_size": facts["image_size"]}
    with named("model"):
        check_model(cfg["model"], size, members=_members(cfg, recipe) if data is not None else 1)
        model = instantiate(cfg["model"])(**size)
    raw = data.sample(64) if data is not None else torch.zeros(shape, dtype=torch.uint8)
    recipe.apply(model, sample=scaling(raw))
    if cfg["channels_last"]:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Classifier(
        model,
        recipe,
        num_classes=facts["num_classes"],
        scaling=scaling,
        seed=seed,
        log_every=cfg["log_every"],
        channels_last=cfg["channels_last"],
        about=dict(facts),
        guard=instantiate(cfg["guard"]) if "guard" in cfg else None,
    )


def _members(cfg: Mapping[str, Any], recipe: Recipe) -> int:
    return max(recipe.members, cfg["trainer"].get("members") or 1)


def build_callbacks(cfg: Mapping[str, Any]) -> list[Callback]:
    """The user's own callbacks. Raises InputError for what is none of Lightning's kind."""
    built = []
    for path, node in own_callbacks(cfg).items():
        with named(path):
            callback = instantiate(node)
        if not isinstance(callback, Callback):
            raise InputError(
                f"{path}._target_={node['_target_']} is no lightning.pytorch.Callback: name a class of one"
            )
        built.append(callback)
    return built


def build_trainer(
    cfg: Mapping[str, Any],
    folder: Path,
    recipe: Recipe,
    batches: int,
    callbacks: list[Any],
    wrong: str | None = None,
) -> Trainer:
    """Lightning's Trainer with the recipe's callbacks, the checkpoints and the logs of one run folder.

    wrong: the convolution that forbids bfloat16 on a CPU, as `knep.utils.hardware.wrong_in_bf16` finds it.
    """
    node = dict(cfg["trainer"])
    if node["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(f"trainer.accelerator={node['accelerator']}: this machine has no GPU, write trainer=cpu")
    monitor, mode = watched(cfg)
    checkpoints = folder / "checkpoints"
    best = Best(checkpoints, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)
    stop = StopOnSignal()
    keeper = Keeper(cfg["checkpoint"]["every"], best, stop)
    logged = [
        Board(folder),
        CsvLogger(folder),
    ]
    quiet = node.pop("fast_dev_run")
    node.pop("members", None)  # each member has a Trainer of its own, or none
    node["precision"] = precision(node["precision"], node["accelerator"], wrong)
    accumulate = batches if recipe.accumulate == "epoch" else int(recipe.accumulate)
    callbacks = [recipe.averaging, recipe.stopping, *callbacks, ProgressBar() if cfg["progress"] else Lines()]
    try:
        trainer = instantiate(
            node,
            default_root_dir=str(folder),
            accumulate_grad_batches=accumulate,
            callbacks=[*callbacks, stop, best, keeper],
            plugins=[*environment(), *([] if "fsdp" in str(node["strategy"]) else [WholeCheckpoints(folder)])],
            logger=logged,
            fast_dev_run=quiet,
            benchmark=fast_products(node["deterministic"]) or None,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            log_every_n_steps=cfg["log_every"],
            use_distributed_sampler=False,
        )
    except (InputError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error
    use_exact_loops(trainer, keeper)
    if cfg["lean"]:
        use_lean_loop(trainer)
    watch(trainer, folder)
    return trainer


def watched(cfg: Mapping[str, Any]) -> tuple[str, str]:
    """The validation metric by which epochs are compared, and its direction."""
    return cfg["stopping"].get("monitor", "val/loss"), cfg["stopping"].get("mode", "min")


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Runs with `count` CPU threads; None leaves torch's choice."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)

"""Lightning's Trainer of one run folder."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from knep.config.command_line.readers import own_callbacks
from knep.config.instantiate import instantiate
from knep.config.schema import Node, RunConfig
from knep.distributed.slurm import environment
from knep.distributed.watchdog import watch
from knep.engine.checkpointing import Best, Keeper
from knep.engine.logging.csv_logger import CsvLogger
from knep.engine.logging.progress import Lines, ProgressBar
from knep.engine.logging.tensorboard import Board
from knep.engine.loops.batch_growth import growth
from knep.engine.loops.exact import use_exact_loops
from knep.engine.loops.interrupts import StopOnSignal
from knep.engine.loops.lean import use_lean_loop
from knep.engine.precision import precision
from knep.errors import InputError, named
from knep.io.checkpoint import WholeCheckpoints
from knep.recipes.recipe import Recipe
from knep.utils.batch_plan import plan_of
from knep.utils.hardware import fast_products


def build_callbacks(node: Node | None) -> list[Callback]:
    """The user's own callbacks. Raises InputError for what is none of Lightning's kind."""
    built = []
    for path, own in own_callbacks({"callbacks": node}).items():
        with named(path):
            callback = instantiate(own)
        if not isinstance(callback, Callback):
            raise InputError(f"{path}._target_={own['_target_']} is no lightning.pytorch.Callback: name a class of one")
        built.append(callback)
    return built


def build_trainer(
    run: RunConfig,
    folder: Path,
    recipe: Recipe,
    batches: int,
    callbacks: list[Callback],
    wrong: str | None = None,
    digits: str | None = None,
) -> Trainer:
    """Lightning's Trainer with the recipe's callbacks, the checkpoints and the logs of one run folder.

    wrong: the convolution that forbids bfloat16 on a CPU, as `knep.engine.precision.wrong_in_bf16` finds it;
    digits: what bfloat16 would round away, as `lost_in_bf16` says.
    """
    node = dict(run.trainer.lightning)
    if node["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(f"trainer.accelerator={node['accelerator']}: this machine has no GPU, write trainer=cpu")
    monitor, mode = run.watched
    checkpoints = folder / "checkpoints"
    best = Best(checkpoints, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)
    stop = StopOnSignal()
    keeper = Keeper(run.checkpoint.every, best, stop)
    logged = [
        Board(folder),
        CsvLogger(folder),
    ]
    quiet = node.pop("fast_dev_run")
    node["precision"] = precision(node["precision"], node["accelerator"], wrong, digits)
    grows = growth(recipe.accumulate, run.slots["optimizer"])
    accumulate = batches if recipe.accumulate == "epoch" else plan_of(recipe.accumulate)[0]
    callbacks = [
        recipe.averaging,
        recipe.stopping,
        *([grows] if grows else []),
        *callbacks,
        ProgressBar() if run.runtime.progress else Lines(),
    ]
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
            log_every_n_steps=run.runtime.log_every,
            use_distributed_sampler=False,
        )
    except (InputError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error
    use_exact_loops(trainer, keeper)
    if run.runtime.lean:
        use_lean_loop(trainer)
    watch(trainer, folder)
    return trainer

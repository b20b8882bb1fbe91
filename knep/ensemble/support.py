"""What can be trained as members of one fit, and what cannot, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from knep.config.command_line.readers import FURTHER
from knep.config.schema import Node, RunConfig
from knep.errors import InputError
from knep.utils.monitors import names_of

# What members may differ in: nothing here changes the images, the model's shapes or the length of training.
FREE = ("seed", "init", "dropout", "optimizer", "clip", "scheduler", "regularization", "layer_decay")
_PRECISIONS = ("auto", "32-true", "32", "64-true", "64", "bf16-mixed")
_AVERAGES = ("none", "Ema", "Swa", "Ensemble")


def supports(run: RunConfig) -> str | None:
    """Why members of this run have to be trained by a run each; None where one fit can train them all."""
    trainer, guard = run.trainer, run.guard or {}
    flag = next((key for key in FURTHER if trainer.lightning.get(key) is not None), None)
    average = _name(run.slots["averaging"])
    option = {"GreedySoup": "greedy_soup"}.get(average, average.lower())
    reasons = {
        f"averaging={option} keeps the checkpoints of a single run": average not in _AVERAGES,
        f"averaging.decay={run.slots['averaging'].get('decay')} compares averages of a single run": isinstance(
            run.slots["averaging"].get("decay"), (list, tuple)
        ),
        f"trainer.devices={trainer.devices} is more than one device": trainer.devices not in (1, "1", "auto")
        or trainer.strategy != "auto"
        or trainer.num_nodes != 1,
        f"trainer.precision={trainer.precision} is not among {', '.join(_PRECISIONS)}": str(trainer.precision)
        not in _PRECISIONS,
        "trainer.max_steps and trainer.max_time end a run inside an epoch": trainer.max_steps != -1
        or trainer.max_time is not None,
        f"trainer.{flag} is a flag of Lightning's loop over a single run": flag is not None,
        "trainer.fast_dev_run tries a single run": bool(trainer.fast_dev_run),
        f"guard.action={guard.get('action')} goes back to the steps of a single run": guard.get("action")
        in ("skip", "rollback"),
        "guard.spike looks at the losses of a single run": guard.get("spike") is not None,
        "finetune freezes and thaws the layers of a single run": _name(run.finetune) != "none",
        "callbacks=doctor watches a single run": run.doctor is not None,
        "callbacks of your own watch a single run": run.callbacks is not None,
        "compile=true compiles a single model": bool(run.runtime.compile),
        "profile=true watches a single run": bool(run.runtime.profile),
        "ckpt resumes single runs": run.resume.ckpt is not None,
        "checkpoint.every saves single runs": run.checkpoint.every is not None,
        "scheduler.monitor needs trainer.check_val_every_n_epoch=1": "monitor" in run.slots["scheduler"]
        and trainer.check_val_every_n_epoch != 1,
        "trainer.limit_val_batches cuts the validation of a single run": trainer.limit_val_batches is not None,
        f"task={run.task_name} is learned by a single run": run.task_name != "multiclass",
        "metrics are measured of a single run": bool(names_of(run.metrics)),
        "data=image_folder decodes its images batch by batch": _name(run.data) == "ImageFolder",
        "data.micro passes the batches of a single run in parts": run.data.get("micro") is not None,
        "model.checkpointing=true computes the blocks of a single model again": run.checkpointing,
        "calibrate=true looks at the scores of a single run": run.calibrate,
        "distill.teacher teaches a single run": bool((run.distill or {}).get("teacher")),
        "accumulate changes over the epochs": isinstance(run.plain.get("accumulate"), Mapping),
        "data=import gives its batches one by one": _name(run.data) == "Imported",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _name(node: Node) -> str:
    return str(node["_target_"]).rpartition(".")[2]


def check_alike(runs: Sequence[RunConfig]) -> None:
    """Raises InputError, naming the key, where runs differ in more than members of one fit may."""
    if not runs:
        raise InputError("members: there is no config to train: give at least one")
    configs = [run.plain for run in runs]
    first = configs[0]
    for number, config in enumerate(configs):
        for key in sorted({*first, *config} - set(FREE)):
            if first.get(key) != config.get(key) and key not in ("name", "progress"):
                raise InputError(
                    f"members: {key} differs between configs 0 and {number}: members share all but {', '.join(FREE)}"
                )
        if first["optimizer"].get("accumulate") != config["optimizer"].get("accumulate"):
            raise InputError(f"members: optimizer.accumulate differs between configs 0 and {number}: train them apart")
        for key in ("interval", "monitor"):
            if first["scheduler"].get(key) != config["scheduler"].get(key):
                raise InputError(f"members: scheduler.{key} differs between configs 0 and {number}: train them apart")


def members_of(run: RunConfig, count: int) -> list[RunConfig]:
    """The runs of `count` members: seeds seed, seed + 1, ..."""
    return [run.seeded(run.seed + i) for i in range(count)]


def folds(runs: Sequence[RunConfig], model: torch.nn.Module, device: torch.device) -> bool:
    """Whether one pass for all members is faster than a pass for each.

    On a CPU a convolution over a batch keeps the cores busy, and its signals fill the cache: measured with torch 2.14
    on an AMD EPYC, a grouped convolution for 8 members took 1.2 to 8 times as long as 8 convolutions.
    """
    convolves = any(isinstance(m, torch.nn.modules.conv._ConvNd) for m in model.modules())
    return not apart(runs) and (device.type != "cpu" or not convolves)


def apart(runs: Sequence[RunConfig]) -> bool:
    """Whether the optimizer needs a pass for each member.

    SAM asks for a second gradient in its step. SOAP's eigenvectors amplify rounding: a change of the first weights by
    1e-15 of their size becomes 0.2 after 20 steps in float64, so that only the same operations give the same run.
    """
    return any(_name(run.slots["optimizer"]) in ("sam", "SOAP") for run in runs)

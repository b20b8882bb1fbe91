"""The black box: a file with all that one bad step depended on, and what it came to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from knep.data.loaders import order_of, training_slice
from knep.errors import InputError
from knep.guard.finite import digest, first_bad, size
from knep.guard.guarded import Guarded
from knep.guard.optimizer_state import named_state
from knep.guard.policy import KINDS, OF_OPTIMIZER
from knep.guard.step_state import Moment, grads, repeat
from knep.io import checkpoint
from knep.io.schema import anything, either, items, nothing, number, one_of, record, same, table, text, whole

# Beside its weights a box may hold this share of the checkpoint's tensors before the optimizer's state is left out.
_ROOM = 0.8


def write_box(
    module: Guarded, kind: str, moment: Moment, loss: float, batch_idx: int, step: int, path: Path | None
) -> str | None:
    """Writes what repeats the step that has just gone wrong; returns the first bad place, in words, where there is one.

    The module is as the step found it: for a bad step of the optimizer as it was before the whole step, otherwise as
    it was before the pass that failed. loss: of that pass, as backward saw it; step: its number; path: None writes
    nothing.
    """
    trainer = module.trainer
    met = digest(grads(module).items())
    state = {name: t.detach().clone() for name, t in module.state_dict().items()}
    optimizer = trainer.optimizers[0]
    found = repeat(module, moment, trainer.precision_plugin.forward_context)
    given = first_bad(zip(("images", "labels"), moment.batch, strict=False))
    place = f"the batch's {given}" if given else found.table.place()
    place = place or (found.bad and f"the gradient of {found.bad}")
    if step != trainer.global_step:
        met = found.gradients  # those of the step are gone
    if kind in OF_OPTIMIZER:
        loss, met = found.loss, found.gradients  # the step's first pass, where its optimizer made two
        bad = first_bad(named_state(module.model, optimizer))
        place = bad and f"the optimizer's {bad}"
    if path is None:
        return place
    kept = _optimizer_state(kind, optimizer, moment, state)
    box = {
        "box": 1,
        "knep": module.about,
        "kind": kind,
        "step": step,
        "epoch": trainer.current_epoch,
        "batch_idx": batch_idx,
        "batches": trainer.num_training_batches,
        "indices": _indices(module, batch_idx),
        "batch": list(moment.batch),
        "rng": dict(moment.rng),
        "gradients": dict(moment.gradients),
        "weight": moment.weight,
        "window": moment.window,
        "augment_epoch": moment.epoch,
        "scale": moment.scale,
        "state_dict": state,
        "optimizer": kept,
        "precision": str(trainer.precision),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "found": {"loss": loss, "gradients": met if trainer.world_size == 1 else None},
        "repeats": found.loss == loss or (loss != loss and found.loss != found.loss),
        "place": place,
        "layers": found.table.plain(),
    }
    checkpoint.write(box, path)
    return place


def _optimizer_state(
    kind: str, optimizer: Optimizer, moment: Moment, state: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """The optimizer's state: always where its step went wrong, otherwise where the box stays small."""
    found = optimizer.state_dict()
    room = _ROOM * (size(state) + size(found))
    return found if kind in OF_OPTIMIZER or size(moment.batch) + size(moment.gradients) <= room else None


def _indices(module: Guarded, batch_idx: int) -> Tensor | None:
    """Which training images (n,) the batch holds, for loaders whose order is a function of seed and epoch."""
    trainer = module.trainer
    data = getattr(trainer, "datamodule", None)
    if data is None or not hasattr(data, "sizes"):
        return None
    images, world, rank = data.sizes["train"], trainer.world_size, trainer.global_rank
    weights = data.row_weights() if hasattr(data, "row_weights") else None
    order = order_of(images, data.seed, trainer.current_epoch, weights)
    return order[training_slice(batch_idx, data.batch_size, images, rank, world)].clone()


@dataclass
class Box:
    """A box that was read and looked at."""

    path: Path
    values: Mapping[str, Any]
    moment: Moment


def _tensor(value: object) -> str | None:
    return None if isinstance(value, Tensor) else f" is a {type(value).__name__}, not a tensor"


_BOX = record(
    {
        "box": same(1),
        "knep": table(anything),
        "kind": one_of(*KINDS),
        "step": whole(),
        "epoch": whole(),
        "batch_idx": whole(),
        "batch": items(_tensor, _tensor),
        "rng": record({"cpu": _tensor}, {"cuda": _tensor}),
        "gradients": table(_tensor),
        "weight": number(0),
        "window": whole(1),
        "augment_epoch": whole(),
        "state_dict": table(_tensor),
        "optimizer": either(nothing, table(anything)),
        "precision": text(most=40),
        "threads": whole(1, 4095),
        "found": record({"loss": number(finite=False), "gradients": either(nothing, text())}),
    },
    closed=False,
)


def _late(values: Mapping[str, Any]) -> str | None:
    """What is wrong with a step that comes before its time: no more steps can lie behind it than batches do."""
    epoch, batches = values["epoch"], values.get("batches", 0 if values["epoch"] == 0 else math.inf)  # not in old boxes
    if not isinstance(batches, (int, float)) or isinstance(batches, bool) or not batches >= 0:
        return ".batches is no number of batches"
    behind = (epoch * batches if epoch else 0) + values["batch_idx"]
    return f".step is {values['step']}, behind only {behind} batches" if values["step"] > behind else None


def read_box(path: Path) -> Box:
    """Opens a box, which may come from a stranger: plain data, never unpickled, each part of its type.

    Raises InputError where it is missing, damaged or something else.
    """
    if not path.is_file():
        raise InputError(f"replay={path} is missing: give the blackbox.pt of a run that its guard stopped")
    values = checkpoint.read(path)
    wrong = (
        _BOX(values) or _late(values) if isinstance(values, dict) and "box" in values else " was not written by a guard"
    )
    if wrong:
        raise InputError(
            f"replay={path} is no black box of knep: its content{wrong}: give the blackbox.pt of a run that its guard "
            "stopped"
        )
    if values["kind"] in OF_OPTIMIZER and values["optimizer"] is None:
        raise InputError(f"replay={path} is no black box of knep: it has no optimizer, give another one")
    scale = values.get("scale", 1.0)  # boxes of earlier releases have none
    moment = Moment(
        tuple(values["batch"]),
        values["rng"],
        values["gradients"],
        values["weight"],
        values["window"],
        values["augment_epoch"],
        scale,
    )
    return Box(path, values, moment)

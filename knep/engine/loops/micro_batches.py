"""Micro-batches: a batch in parts that fit into memory, whose gradients add up to the whole one's (data.micro)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from knep.config.budget import machine_memory
from knep.data.base import ImageData
from knep.errors import InputError
from knep.utils.batch_plan import plan_of
from knep.utils.hardware import free_memory

if TYPE_CHECKING:
    from knep.engine.module import Classifier

_ROOM = 0.8  # share of the free memory that may be planned with
_PASS = 2.0  # what a pass takes beside what it keeps for backward: gradients of activations, work space
_STATE = 4  # times the weights: their gradients, and an optimizer's moments


def use_micro_batches(data: ImageData, module: Classifier, device: torch.device) -> str | None:
    """Has the data give parts of its batches and the recipe add them up, as data.micro says; a line that says so.

    None where nothing is asked for. Raises InputError where the parts would not give what the whole batch gives, or
    not one row fits.
    """
    asked = getattr(data, "micro", None)
    if asked is None:
        return None
    recipe = module.recipe
    if recipe.accumulate == "epoch":
        raise InputError("data.micro splits batches, and optimizer=gd takes a step an epoch: write data.batch_size=...")
    statistics = next((name for name, m in module.model.named_modules() if isinstance(m, _BatchNorm)), None)
    micro = rows_that_fit(data, module, device) if asked == "auto" else int(asked)
    if statistics is not None and micro < data.whole_batch:
        raise InputError(
            f"data.micro={micro}: {statistics} normalises over the batch, so that parts of it give other numbers: "
            "write norm=group, or a smaller data.batch_size with accumulate=..."
        )
    parts = data.split_batches(micro)
    plan = plan_of(recipe.accumulate)
    recipe.accumulate = {e: n * parts for e, n in plan.items()} if len(plan) > 1 else plan[0] * parts
    found = " (data.micro=auto)" if asked == "auto" else ""
    if parts == 1:
        return f"batches of {data.whole_batch} whole{found}"
    return f"batches of {data.whole_batch} in {parts} parts of {micro}{found}; random draws are those of the parts"


def rows_that_fit(data: ImageData, module: Classifier, device: torch.device) -> int:
    """The largest part of a batch, by halves, for whose pass there is memory. Raises InputError where there is none."""
    weights = sum(p.numel() * p.element_size() for p in module.model.parameters())
    room = _ROOM * min(free_memory(device), machine_memory()) - _STATE * weights
    each = _PASS * bytes_per_row(module, data.sample(4))
    rows = data.whole_batch
    while rows * each > room and rows % 2 == 0:
        rows //= 2
    if rows * each > room:
        raise InputError(
            f"data.micro=auto: a row takes about {each / 2**20:,.0f} MiB of {max(room, 0) / 2**20:,.0f} MiB that are "
            "free: write a smaller model, or a data.batch_size that can be halved more often"
        )
    return rows


def bytes_per_row(module: Classifier, rows: Tensor) -> float:
    """Bytes that a training pass keeps for backward, per row; rows: at least 2 raw ones."""
    few, many = (_kept(module, rows[:count]) for count in (1, len(rows)))
    return max(1.0, (many - few) / (len(rows) - 1))


def _kept(module: Classifier, rows: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in module.model.parameters()}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    before = {name: b.clone() for name, b in module.model.named_buffers()}
    with torch.random.fork_rng(), saved_tensors_hooks(pack, lambda t: t):
        out = module(rows)  # its graph holds what was saved, so that no storage is counted under another's address
    for name, b in module.model.named_buffers():
        b.copy_(before[name])
    del out
    return sum(seen.values())


class SameEverywhere(Callback):
    """Ends a fit before its first step where processes take parts of different sizes."""

    def __init__(self, data: ImageData) -> None:
        self._data = data

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        found: list[int] = [0] * trainer.world_size
        dist.all_gather_object(found, self._data.batch_size)
        if len(set(found)) > 1:
            raise InputError(
                f"data.micro=auto found {sorted(set(found))} on different processes: write data.micro={min(found)}"
            )

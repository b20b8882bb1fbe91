"""Batch-norm statistics of weights that no training pass has seen, through anybody's own training step."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from torchmetrics import Metric

_TORCHS = frozenset(vars(nn.Module()))


def through_own_steps(trainer: Trainer, module: LightningModule, batches: int) -> None:
    """Sets each batch norm's running statistics to the mean over `batches` training batches, all for 0.

    The batches go through `training_step` in train mode, without gradients; where a module steps its optimizers there
    itself (manual optimization), through `validation_step`. What it logs and counts meanwhile is dropped, its other
    buffers, such as a memory bank that steps fill, are as before, and so are its attributes: numbers, and what lists,
    dicts, sets and queues hold, but not what objects of its own do. No random number of the run is used up.
    """
    step = module.training_step if module.automatic_optimization else module.validation_step
    if step.__name__ == "validation_step" and not is_overridden("validation_step", module):
        return
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    modes = {m: m.training for m in module.modules()}
    momenta = {m: m.momentum for m in norms}
    cuda = [module.device] if module.device.type == "cuda" else []
    kept = _attributes_kept(module, norms), _unlogged(module), _buffers_kept(module, norms)
    with torch.random.fork_rng(cuda), torch.no_grad(), kept[0], kept[1], kept[2]:
        torch.manual_seed(0)
        module.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
        for index, batch in enumerate(again(trainer)):
            if (batches and index >= batches) or index >= trainer.num_training_batches:
                break
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            with trainer.precision_plugin.train_step_context():
                step(batch, index)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
        if trainer.world_size > 1 and not isinstance(norm, nn.SyncBatchNorm):  # each process saw its own batches
            for buffer in (norm.running_mean, norm.running_var):
                assert buffer is not None
                buffer.copy_(trainer.strategy.reduce(buffer, reduce_op="mean"))
    for m, mode in modes.items():
        m.training = mode


def again(trainer: Trainer) -> Iterator[Any]:
    """The training batches from the start, beside the loop that is reading them."""
    loaders: Any = trainer.train_dataloader
    if isinstance(loaders, DataLoader):
        loader = copy.copy(loaders)
        loader._iterator = None  # of persistent workers, which the loop goes on with
        yield from loader
    elif isinstance(loaders, (list, tuple, dict)):
        yield from (batch for batch, _, _ in CombinedLoader(loaders, "max_size_cycle"))
    else:
        yield from loaders


@contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """Drops what steps log, and what metrics of the module count."""
    metrics = {m: copy.deepcopy(m.__dict__) for m in module.modules() if isinstance(m, Metric)}
    names = [name for name in ("log", "log_dict") if name not in module.__dict__]
    for name in names:
        object.__setattr__(module, name, _nothing)
    try:
        yield
    finally:
        for name in names:
            object.__delattr__(module, name)
        for metric, kept in metrics.items():
            vars(metric).clear()
            vars(metric).update(kept)


@contextmanager
def _buffers_kept(module: nn.Module, norms: list[Any]) -> Iterator[None]:
    """Gives every buffer but those of the norms its tensor and its value back."""
    others = [m for m in module.modules() if not any(m is norm for norm in norms)]
    kept = [(m, name, b, b.clone()) for m in others for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for m, name, buffer, value in kept:
            buffer.copy_(value)
            setattr(m, name, buffer)


@contextmanager
def _attributes_kept(module: nn.Module, norms: list[Any]) -> Iterator[None]:
    """Gives every module but norms and metrics its attributes back, and containers among them what they held."""
    others = [m for m in module.modules() if not isinstance(m, Metric) and not any(m is norm for norm in norms)]
    kept = [(m, {name: (value, _held(value)) for name, value in _own(m).items()}) for m in others]
    try:
        yield
    finally:
        for m, attributes in kept:
            for name in _own(m).keys() - attributes.keys():
                del vars(m)[name]
            for name, (value, held) in attributes.items():
                vars(m)[name] = value
                if held is not None and not _same(_held(value), held):
                    value.clear()
                    (value.extend if isinstance(held, list) else value.update)(held)


def _own(module: nn.Module) -> dict[str, Any]:
    """What a module's author set on it: neither torch's own attributes nor its mode."""
    return {name: value for name, value in vars(module).items() if name not in _TORCHS}


def _held(value: Any) -> list[Any] | dict[Any, Any] | set[Any] | None:
    kinds = {list: list, deque: list, dict: dict, set: set}
    return next((to(value) for kind, to in kinds.items() if isinstance(value, kind)), None)


def _same(now: Any, before: Any) -> bool:
    """Whether containers hold the same objects; tensors among them are not compared by value."""
    if isinstance(now, set):
        return now == before
    parts = [(*c.keys(), *c.values()) if isinstance(c, dict) else c for c in (now, before)]
    return len(parts[0]) == len(parts[1]) and all(a is b for a, b in zip(*parts, strict=True))


def _nothing(*args: object, **kwargs: object) -> None:
    """In the place of `self.log`."""

"""Activation checkpointing: blocks keep their input alone, and are computed again in backward (Chen et al. 2016)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from knep.errors import InputError

_CHECKPOINT: Any = checkpoint  # whose stub knows it as a decorator alone


def recompute_blocks(model: nn.Module) -> list[str]:
    """Has each of the model's repeated blocks compute its activations again in backward; returns their paths.

    A block is a child of a list or a sequence that has weights of its own and a sibling of the same class there.
    Parameters keep their names; running statistics move once a step, as without. Outputs and gradients are the same,
    for a third more computation.
    Raises InputError where there is no such block, or where a parametrization counts its passes (spectral norm).
    """
    found = [path for path, block in _blocks(model)]
    if not found:
        raise InputError(
            "model.checkpointing=true recomputes blocks that repeat in a list or a sequence, and this model has none: "
            "leave it out, or write data.micro=..."
        )
    counted = next((path for path, m in model.named_modules() if type(m).__name__ == "_SpectralNorm"), None)
    if counted is not None:
        raise InputError(
            f"model.checkpointing=true passes twice through {_owner(counted)}, whose spectral "
            "norm moves with each pass: write norm=weight or another one"
        )
    for path in found:
        _recompute(model.get_submodule(path))
    return found


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost repeated blocks, in the order of registration."""
    taken: list[str] = []
    for path, parent in model.named_modules():
        if not isinstance(parent, (nn.Sequential, nn.ModuleList)) or any(_inside(path, block) for block in taken):
            continue
        kinds = Counter(type(child) for child in parent)
        for name, child in parent.named_children():
            deep = any(True for _ in child.children())
            if deep and kinds[type(child)] > 1 and any(p.requires_grad for p in child.parameters()):
                taken.append(f"{path}.{name}" if path else name)
                yield taken[-1], child


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _recompute(block: nn.Module) -> None:
    forward, twice = block.forward, _CHECKPOINT

    def again(*args: object, **kwargs: object) -> object:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return twice(
            forward, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _still(block)), **kwargs
        )

    block.forward = again


@contextlib.contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Running statistics stay where they are: the first pass has moved them."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [{name: b.clone() for name, b in m.named_buffers(recurse=False)} for m in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, buffers in zip(norms, kept, strict=True):
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)


def _owner(parametrization: str) -> str:
    return parametrization.partition(".parametrizations")[0]

"""Chance while somebody else's loaders are read: the same in each examination, and theirs goes on as if nobody had."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def undisturbed(seed: int, *loaders: Any) -> Iterator[None]:
    """The generators of Python, NumPy and PyTorch start from `seed` meanwhile, and go on afterwards from where they
    were; so do the generators that the loaders or their samplers have of their own, which keep their state."""
    own = {id(g): g for g in map(_generator, _parts(loaders)) if g is not None}
    kept = {key: g.get_state() for key, g in own.items()}
    with isolate_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for key, g in own.items():
                g.set_state(kept[key])


def _parts(loaders: tuple[Any, ...]) -> Iterator[Any]:
    for loader in loaders:
        yield loader
        for name in ("sampler", "batch_sampler"):
            sampler = getattr(loader, name, None)
            yield sampler
            yield getattr(sampler, "sampler", None)


def _generator(part: Any) -> torch.Generator | None:
    found = getattr(part, "generator", None)
    return found if isinstance(found, torch.Generator) else None

"""What only the loaders show: a few rows for ever, another validation at each pass, noise that repeats itself."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from knep.doctor.findings import Finding, finding
from knep.doctor.subject.any_batch import first, row_bytes, tensors
from knep.doctor.subject.any_task import Subject
from knep.doctor.subject.rng_isolation import undisturbed

_FEW, _LOOKS = 0.1, 24


def repeated_rows(subject: Subject) -> list[Finding]:
    """repeated_rows where an epoch shows a small share of the rows, each many times."""
    drawn = _indices(subject)
    if drawn:
        return drawn
    keys = _keys(subject, subject.train)
    if len(keys) < 64:
        return []
    unique = len(set(keys))
    if unique > _FEW * len(keys):
        return []
    held = _keys(subject, subject.val)
    if not held or len(set(held)) < min(0.5 * len(held), 3 * unique / len(keys) * len(held)):
        return []  # data of few different rows
    return [_told(unique, len(keys), "rows as the loader gives them")]


def _indices(subject: Subject) -> list[Finding]:
    """The same by the sampler's indices, which random transforms cannot hide."""
    loader = subject.loaders[0]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return []
    sampler, size = loader.sampler, _size(loader.dataset)
    if size is None or size < 32:
        return []
    weights = getattr(sampler, "weights", None)
    if isinstance(sampler, WeightedRandomSampler) and isinstance(weights, Tensor):
        reached = int((weights > 0).sum())
        if reached < 0.5 * size:
            text = f"the sampler has {len(weights)} weights, {reached} above 0, for {size:,} rows: it draws no others"
            mend = "give the sampler a weight for each row, class_weights[labels], not for each class"
            return [finding("repeated_rows", text, 0.97, mend=mend)]
        return []
    with undisturbed(subject.seed, loader):
        try:
            seen = [int(i) for _, i in zip(range(20000), iter(sampler), strict=False)]
        except (TypeError, ValueError):
            return []
    if len(seen) < 64 or len(set(seen)) > _FEW * min(len(seen), size):
        return []
    return [_told(len(set(seen)), len(seen), f"indices of {size:,}")]


def _told(unique: int, count: int, what: str) -> Finding:
    text = f"{count:,} {what} in an epoch of training are {unique} different ones"
    return finding("repeated_rows", text, 0.96 if unique < 0.03 * count else 0.85)


def _size(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _keys(subject: Subject, batches: Any, most: int = 20000) -> list[bytes]:
    keys: list[bytes] = []
    for batch in batches:
        keys += row_bytes(batch, subject.rows(batch))
        if len(keys) >= most:
            break
    return keys


def random_validation(subject: Subject) -> list[Finding]:
    """random_validation where a second pass gives rows of validation other inputs."""
    loader = subject.loaders[1]
    if loader is None or isinstance(loader, (list, tuple)) or iter(loader) is loader:
        return []
    again = _by_index(loader)
    if again is not None:
        return again
    passes = []
    for seed in (1, 2):
        with undisturbed(seed, loader):
            passes.append([b for _, b in zip(range(40), loader, strict=False)])
    a, b = (Counter(_keys(subject, seen)) for seen in passes)
    rows, both = sum(a.values()), sum((a & b).values())
    if len(passes[0]) >= 40 or not rows or both > 0.5 * rows or sum(b.values()) != rows:
        return []
    return [_random(f"{rows - both} of {rows} rows of validation are others at a second pass")]


def _by_index(loader: Any) -> list[Finding] | None:
    """The same by the data set's rows, one by one; None where they have no number, or a batch may still change them."""
    data = getattr(loader, "dataset", None)
    size = None if data is None or isinstance(data, IterableDataset) else _size(data)
    if not size:
        return None
    index = [i * size // min(size, _LOOKS) for i in range(min(size, _LOOKS))]
    seen = []
    for seed in (1, 2):
        with undisturbed(seed, loader):
            try:
                seen.append([data[i] for i in index])  # pyright: ignore[reportOptionalSubscript]
            except Exception:  # a data set that is read in another way
                return None
    moved = sum(_differ(a, b) for a, b in zip(*seen, strict=True))
    if moved < 0.3 * len(index):
        return None
    return [_random(f"{moved} of {len(index)} rows of validation, each taken twice, have other values the second time")]


def _random(text: str) -> Finding:
    return finding("random_validation", f"{text}: a random transform acts on them", 0.9)


def _differ(a: Any, b: Any) -> bool:
    s, t = (_number(v) for v in (a, b))
    return s.shape != t.shape or not np.allclose(s, t, rtol=1e-4, atol=1e-6, equal_nan=True)


def _number(row: Any) -> np.ndarray:
    """The first tensor, array or number of a row."""
    value = next(iter(row.values()), 0.0) if isinstance(row, dict) else row
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    found = first(value)
    return np.asarray(found if found is not None else value, dtype=np.float64)


def repeated_noise(subject: Subject) -> list[Finding]:
    """repeated_noise where a row's transform draws the same for every row, in each worker or in each epoch."""
    loader = subject.loaders[0]
    data = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(data, IterableDataset) or not _size(data):
        return []
    return _reseeded(loader, data) or _workers(subject, loader, data)


def _reseeded(loader: Any, data: Any) -> list[Finding]:
    """Whether taking a row sets the generators of the whole process."""
    after: list[tuple[bytes, ...]] = []
    before: list[tuple[bytes, ...]] = []
    for seed in (11, 12):
        with undisturbed(seed, loader):
            before.append(_states())
            try:
                data[0]
            except Exception:  # a data set that is read in another way
                return []
            after.append(_states())
    names = ("random", "NumPy", "PyTorch")
    reset = [n for n, a, b, p, q in zip(names, *after, *before, strict=True) if a == b and a != p and b != q]
    if not reset:
        return []
    text = (
        f"taking a row sets the generator of {' and '.join(reset)} to a fixed seed: every row gets the same draws, in "
    )
    return [
        finding("repeated_noise", f"{text}every epoch", 0.9, mend="seed once, before training, and not for each row")
    ]


def _states() -> tuple[bytes, ...]:
    numpy: Any = np.random.get_state()
    own = random.getstate()
    return (repr(own).encode(), np.asarray(numpy[1]).tobytes() + str(numpy[2]).encode(),
            torch.get_rng_state().numpy().tobytes())  # fmt: skip


def _workers(subject: Subject, loader: DataLoader, data: Any) -> list[Finding]:
    """One row asked for again and again: from every worker, and in two epochs."""
    with undisturbed(3, loader):
        try:
            a, b = _number(data[0]), _number(data[0])
        except Exception:  # a data set that is read in another way
            return []
    if a.shape != b.shape or np.allclose(a, b):
        return []  # nothing is drawn
    workers = min(loader.num_workers, 2)
    if not workers:
        return []
    epochs = []
    for seed in (5, 6):
        with undisturbed(seed, loader):
            again = DataLoader(data, 4, sampler=[0] * 4 * max(workers, 2), num_workers=workers,
                               worker_init_fn=loader.worker_init_fn, collate_fn=loader.collate_fn)  # fmt: skip
            epochs.append([next(tensors(batch)).detach().clone() for batch in again])
    one, two = epochs
    said = []
    if workers > 1 and one[0].shape == one[1].shape and bool(torch.equal(one[0], one[1])):
        said.append("every worker gives a row the same draws")
    if all(s.shape == t.shape and bool(torch.equal(s, t)) for s, t in zip(one, two, strict=True)):
        said.append("every epoch repeats the draws of the one before")
    if not said:
        return []
    text = f"with {loader.num_workers} workers, {' and '.join(said)}"
    mend = "draw from torch or NumPy's own generator, which each worker seeds anew, or seed yours by "
    mend += "torch.initial_seed() in worker_init_fn"
    return [finding("repeated_noise", text, 0.88, mend=mend)]

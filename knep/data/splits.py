"""Stratified splits, a function of labels and a seed of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from knep.errors import InputError
from knep.utils.rng import generator


def stratified(y_N: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images that stay and of those that are split off, `share` of each class, at least one of each.

    Both are sorted. Raises InputError where a class has fewer than two images.
    """
    stay, off = [], []
    for k in y_N.unique().tolist():
        members = (y_N == k).nonzero().flatten()
        if len(members) < 2:
            raise InputError(f"class {k} has {len(members)} image and cannot be split: give it at least 2 images")
        members = members[torch.randperm(len(members), generator=generator(seed, k, 2))]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        off.append(members[:count])
        stay.append(members[count:])
    return torch.cat(stay).sort().values, torch.cat(off).sort().values


def subset(y_N: Tensor, limit: int | None, seed: int) -> Tensor:
    """Indices of `limit` images with the classes' proportions kept; all images for None or a limit above them.

    Raises InputError for a limit below the number of classes.
    """
    if limit is None or limit >= len(y_N):
        return torch.arange(len(y_N))
    classes = int(y_N.max()) + 1
    if limit < classes:
        raise InputError(f"data.limit={limit} leaves some of the {classes} classes without an image: write more")
    # Ranks within the class, divided by its size, interleave the classes in proportion.
    place = torch.empty(len(y_N), dtype=torch.float64)
    for k in y_N.unique().tolist():
        members = (y_N == k).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator(seed, k, 3))]
        place[members] = torch.arange(len(members), dtype=torch.float64) / len(members)
    return place.argsort(stable=True)[:limit].sort().values


def at_random(rows: int, share: float, seed: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices of the rows that stay, at most `limit`, and of those that are split off, `share` of all; both sorted.

    Raises InputError where there are fewer than two rows.
    """
    if rows < 2:
        raise InputError(f"{rows} row cannot be split: give at least 2")
    order = torch.randperm(rows, generator=generator(seed, 0, 5))
    count = min(max(1, round(share * rows)), rows - 1)
    return order[count:][:limit].sort().values, order[:count].sort().values

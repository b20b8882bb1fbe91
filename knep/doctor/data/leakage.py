"""The same images in training and validation: exact copies by their bytes, near ones by their nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.doctor.data.baselines import small
from knep.doctor.data.split_view import Split, evenly
from knep.doctor.findings import Finding, finding

_QUERIES = 2000  # images of each split whose neighbours are looked for
_NEAR = 0.35  # nearest over tenth nearest distance, below which an image is a copy
_TENTH = 10


@dataclass(frozen=True)
class Twins:
    """exact: share of validation images that are training images, byte by byte; inside: share of training images that
    occur there twice; near, near_inside: the same for near copies, which only brightness, contrast or slight noise
    tell apart, measured on the images looked at; pairs: a few (validation image, training image) by their order.
    """

    exact: float
    inside: float
    near: float
    near_inside: float
    pairs: tuple[tuple[int, int], ...]


def twins(train: Split, val: Split) -> Twins:
    places = {key: i for i, key in enumerate(train.key)}
    exact = [(i, places[key]) for i, key in enumerate(val.key) if key in places]
    inside = 1 - len(places) / len(train.key)
    near = near_inside = 0.0
    pairs = exact[:4]
    if len(val) and _same_shape(train, val):
        first = {train.key[i]: place for place, i in reversed(list(enumerate(train.at.tolist())))}
        once = torch.tensor(sorted(first.values()))  # an image drawn ten times would be its own tenth neighbour
        bank = _shapes(train.small[once])
        if len(bank) < 2 * _TENTH:
            return Twins(len(exact) / len(val.key), inside, 0.0, 0.0, tuple(pairs))
        ours, theirs = evenly(len(bank), _QUERIES), evenly(len(val), _QUERIES)
        ratio, nearest = _nearness(_shapes(val.small[theirs]), bank, None)
        own, _ = _nearness(bank[ours], bank, ours)
        near, near_inside = float((ratio < _NEAR).double().mean()), float((own < _NEAR).double().mean())
        hits = (ratio < _NEAR).nonzero().flatten()[:4]
        close = zip(val.at[theirs[hits]].tolist(), train.at[once[nearest[hits]]].tolist(), strict=True)
        pairs = pairs or list(close)
    return Twins(len(exact) / len(val.key), inside, near, near_inside, tuple(pairs))


def _same_shape(train: Split, val: Split) -> bool:
    return len(train) > 0 and train.small.shape[1:] == val.small.shape[1:]


def _shapes(images: Tensor) -> Tensor:
    """Images without their brightness and contrast: unit vectors (n, D)."""
    x = small(images).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def _nearness(queries: Tensor, bank: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """(nearest over tenth nearest distance, index of the nearest); own: a query's own index, which does not count."""
    cosine = queries @ bank.T
    if own is not None:
        cosine[torch.arange(len(own)), own] = -2
    top, index = cosine.topk(_TENTH, dim=1)
    distance = (2 - 2 * top.double()).clamp_min(1e-7).sqrt()
    return distance[:, 0] / distance[:, -1], index[:, 0]


def twin_findings(t: Twins, train: Split, val: Split) -> list[Finding]:
    """Validation images that are training images too, beyond the few that sound data sets have.

    Measured: no byte-equal pair, and near ones at most 0.25 % in digits, 5,000 images of Fashion-MNIST and synthetic.
    """
    exact, near = round(t.exact * len(val.key)), round(t.near * min(len(val), _QUERIES))
    pairs = ", ".join(f"validation image {v} is training image {k}" for v, k in t.pairs[:3])
    if t.exact > 0.005 and exact > 1:
        text = f"{exact} of {len(val.key)} validation images ({100 * t.exact:.3g} %) are training images: {pairs}"
        return [finding("leaked_validation", text, min(0.85, 0.5 + t.exact), certain=t.exact > 0.02 and exact > 2)]
    few = float(train.y.unique(return_counts=True)[1].double().median()) < 20
    usual = 0.1 + 3 * t.near_inside if few else 0.03 + 3 * t.near_inside * (t.near < 0.3)
    if t.near > usual and near > 2:
        text = f"{near} of {min(len(val), _QUERIES)} validation images looked at ({100 * t.near:.3g} %) are copies of "
        text += (
            f"training images but for brightness or slight noise ({100 * t.near_inside:.3g} % within training): {pairs}"
        )
        return [finding("leaked_validation", text, min(0.8, 0.45 + t.near), certain=t.near > 0.05 and not few)]
    return []


def twins_seen(t: Twins) -> dict[str, float]:
    """Plain data: the shares of Twins."""
    return {"exact": t.exact, "inside": t.inside, "near": t.near, "near_inside": t.near_inside}

"""Classifiers in closed form: nearest neighbours, and ridge regression on random features of pixels and patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.utils.rng import generator

_RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # times the number of images
_HELD = 5  # every fifth image chooses the ridge
_SIDE = 16  # pixels, of the images that patches are drawn from
_DRAWN = 2000  # patches that the whitening is made from
_BATCH = 64  # images whose patches are in memory at once


def nearest(x: Tensor, queries: Tensor, count: int, own: Tensor | None = None) -> Tensor:
    """Indices (m, count) of each query's nearest rows of x, the nearest first, in Euclidean distance.

    x (n, D), queries (m, D); own (m,): a query's own row of x, which does not count. Fewer where x has fewer rows.
    """
    far = x.square().sum(1)[None] - 2 * queries @ x.T
    if own is not None:
        far[torch.arange(len(own)), own] = math.inf
    return far.topk(min(count, len(x) - (own is not None)), dim=1, largest=False).indices


def voted(y: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """(class, share of the votes), both (m,), by the classes y int64 (n,) of neighbours (m, count); a tie goes to the
    nearer ones (Cover and Hart 1967).
    """
    count = near.shape[1]
    votes = torch.zeros(len(near), int(y.max()) + 1)
    weight = (1 + 1e-3 * torch.arange(count, 0, -1) / count).expand(len(near), count)
    share, guess = votes.scatter_add_(1, y[near], weight).max(1)
    return guess, share / count


def ridge(a: Tensor, y: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(classes of the queries, classes of every fifth row of a by the others, which rows those are).

    a (n, D) features, y int64 (n,), queries (m, D). The strength is chosen on every fifth row.
    """
    mean, std = a.mean(0), a.std(0, correction=0)
    std = torch.where(std > 1e-6, std, 1.0)
    a, queries = (F.pad((f - mean) / std, (0, 1), value=1.0) for f in (a, queries))
    target = 2 * F.one_hot(y).float() - 1
    held = torch.arange(len(a)) % _HELD == 0
    gram, gram_held = a[~held].T @ a[~held], a[held].T @ a[held]
    side, side_held = a[~held].T @ target[~held], a[held].T @ target[held]
    tried = []
    for strength in _RIDGES:
        guess = (a[held] @ _solved(gram, side, strength * len(a))).argmax(1)
        tried.append((float((guess == y[held]).double().mean()), strength, guess))
    _, strength, own = max(tried, key=lambda t: t[:2])
    weight = _solved(gram + gram_held, side + side_held, strength * len(a))
    return (queries @ weight).argmax(1), own, held


def _solved(gram: Tensor, side: Tensor, strength: float) -> Tensor:
    return torch.cholesky_solve(side, torch.linalg.cholesky(gram + strength * torch.eye(len(gram))))


def random_relu(x: Tensor, count: int = 600) -> Tensor:
    """Random ReLU features (n, count) of images x (n, C, h, w) of mean 0 and deviation 1 (Rahimi and Recht 2008)."""
    flat = x.flatten(1)
    weight = torch.randn(flat.shape[1], count, generator=generator(1, 12)) / math.sqrt(flat.shape[1])
    return (flat @ weight + 0.3 * torch.randn(count, generator=generator(2, 12))).relu()


class Patches:
    """ReLU responses of both signs to whitened random patches, averaged over a 3 x 3 grid (Coates, Lee and Ng 2011)."""

    def __init__(self, x: Tensor, filters: int = 48, size: int = 5) -> None:
        x = small(x)
        self.size = min(size, *x.shape[2:])
        draw = generator(3, 12)
        which = torch.randint(len(x), (_DRAWN,), generator=draw)
        columns = F.unfold(x[which], self.size)  # (patches, C*size*size, places)
        place = torch.randint(columns.shape[2], (_DRAWN,), generator=draw)
        drawn = columns[torch.arange(_DRAWN), :, place]
        deviation = drawn.std(1, correction=0)
        drawn = drawn[deviation >= 1e-3 * deviation.max()]  # black borders tell nothing
        mean = drawn.mean(0)
        value, vector = torch.linalg.eigh(torch.cov(drawn.T, correction=0).reshape(len(mean), -1))
        value = value.clamp_min(0)
        white = vector @ torch.diag((value + 0.1 * value.mean() + 1e-12).rsqrt()) @ vector.T
        self.kernel = white @ F.normalize((drawn - mean) @ white, dim=1)[:filters].T
        self.bias = -(mean @ self.kernel)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, 18 * filters), or less for images with fewer than 3 places a side."""
        return torch.cat([self._pooled(part) for part in small(x).split(_BATCH)])

    def _pooled(self, x: Tensor) -> Tensor:
        high, wide = (s - self.size + 1 for s in x.shape[2:])
        response = F.unfold(x, self.size).transpose(1, 2) @ self.kernel + self.bias
        both = torch.cat([response, -response], 2).sub(0.5).relu().transpose(1, 2).reshape(len(x), -1, high, wide)
        return F.avg_pool2d(both, (math.ceil(high / 3), math.ceil(wide / 3)), ceil_mode=True).flatten(1)


def small(x: Tensor) -> Tensor:
    """Images (n, C, h, w) averaged down to at most 16 pixels a side."""
    high, wide = x.shape[2:]
    if max(high, wide) <= _SIDE or high == 1:
        return x
    return F.adaptive_avg_pool2d(x, (min(high, _SIDE), min(wide, _SIDE)))

"""From effects of a trick on measured problems to one on another: a hierarchical model over their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from knep.evidence.stats import LEVEL

# What is tried: deviations of a trick's effect between problems; the distance over which problems are alike, in units
# of features; the deviation of tricks' mean effects around that of all.
_TAUS = (0.01, 0.02, 0.04, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.5, 2.2)
_REACHES = (0.5, 1.0, 2.0)
_SPREADS = (0.1, 0.3, 1.0)
_UNTOLD = 0.25  # share of tau^2 that features do not tell, so that no new problem counts as one that was measured
_ROUNDS = 30
_EACH = 0.01  # weight that every tau keeps: none is ruled out by some tricks that had another

Vector = Sequence[float]
Trick = Mapping[str, tuple[float, float]]  # workload -> (effect, standard error)


@dataclass(frozen=True)
class Predicted:
    """The effect on a problem, as `OnWorkload.value`: its mean, and the interval in which it should lie.

    weights: workload -> its share of what the mean was made of.
    """

    mean: float
    low: float
    high: float
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Model:
    """Effect of trick t on problem x: mu_t + g_t(x), mu_t of N(0, spread^2), g_t a Gaussian process of the variance
    tau_t^2 and the correlation (1 - _UNTOLD) exp(-|x - x'|^2 / (2 reach^2)) between two problems (kriging: Matheron
    1963).

    Near a measured problem its effect counts, far from all of them the trick's mean over them, shrunk towards 0; the
    interval is as wide as tau_t says. Of three or four problems tau_t is hardly known: it is averaged over a grid, with
    weights that all tricks together have (empirical Bayes, as for random effects: Raudenbush and Bryk 1985).

    places: workload -> features; weights: of each tau.
    """

    places: Mapping[str, Vector]
    reach: float
    spread: float
    weights: np.ndarray

    @classmethod
    def fitted(cls, tricks: Sequence[Trick], places: Mapping[str, Vector]) -> Model:
        """Of the greatest marginal likelihood."""
        best: tuple[float, Model] | None = None
        for reach in _REACHES:
            for spread in _SPREADS:
                found = cls(places, reach, spread, np.full(len(_TAUS), 1 / len(_TAUS)))
                likelihoods = np.concatenate([found._likelihoods(some) for some in _alike_measured(tricks)])
                weights, total = _weights(likelihoods)
                if best is None or total > best[0]:
                    best = total, cls(places, reach, spread, weights)
        assert best is not None
        return best[1]

    def predict(self, trick: Trick, at: Vector, error: float = 0.0) -> Predicted:
        """The effect at these features; error: the standard error with which it will be measured, for the interval."""
        ys, covs = self._covariances([trick])
        y, cov = ys[0], covs[0]
        here = np.array([self.places[name] for name in trick], float) - np.asarray(at, float)
        across = self.spread**2 + np.square(_TAUS)[:, None] * self._alike(here)
        gains = np.linalg.solve(cov, across[:, :, None])[:, :, 0]
        means = gains @ y
        own = self.spread**2 + np.square(_TAUS)
        deviations = np.sqrt(np.maximum(own - (gains * across).sum(1), 0) + error**2)
        logs = self._likelihoods([trick])[0] + np.log(self.weights)
        shares = np.exp(logs - logs.max())
        shares /= shares.sum()
        parts = np.abs(shares @ gains)
        ends = [_quantile(p, shares, means, deviations) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
        total = float(parts.sum()) or 1.0
        weights = {name: float(part) / total for name, part in zip(trick, parts, strict=True)}
        return Predicted(float(shares @ means), ends[0], ends[1], weights)

    def _covariances(self, tricks: Sequence[Trick]) -> tuple[np.ndarray, np.ndarray]:
        """Effects (N, W) of tricks that share their workloads, and their covariances for each tau (N, T, W, W)."""
        y_NW, errors_NW = (np.array([[one[i] for one in trick.values()] for trick in tricks]) for i in (0, 1))
        at = np.array([self.places[name] for name in tricks[0]], float)
        alike = self._alike(at[:, None] - at[None]) + _UNTOLD * np.eye(len(at))
        shared = self.spread**2 + np.square(_TAUS)[:, None, None] * alike
        return y_NW, shared + (errors_NW**2)[:, None, None, :] * np.eye(len(at))

    def _alike(self, apart: np.ndarray) -> np.ndarray:
        """Correlations, (...), of problems whose features differ by (..., F)."""
        return (1 - _UNTOLD) * np.exp(-np.square(apart).sum(-1) / (2 * self.reach**2))

    def _likelihoods(self, tricks: Sequence[Trick]) -> np.ndarray:
        """Logarithm of the density of each trick's effects, for each tau, (N, T); they share their workloads."""
        y_NW, cov = self._covariances(tricks)
        y = np.broadcast_to(y_NW[:, None], cov.shape[:3])
        squares = (np.linalg.solve(cov, y[..., None])[..., 0] * y).sum(-1)
        return -0.5 * (squares + np.linalg.slogdet(cov)[1] + y.shape[-1] * np.log(2 * np.pi))


def _alike_measured(tricks: Sequence[Trick]) -> list[list[Trick]]:
    """The tricks by the workloads that they were measured on."""
    groups: dict[tuple[str, ...], list[Trick]] = {}
    for trick in tricks:
        groups.setdefault(tuple(trick), []).append(trick)
    return list(groups.values())


def _weights(likelihoods: np.ndarray) -> tuple[np.ndarray, float]:
    """The taus' weights in the mixture that fits all tricks (EM), and the logarithm of its likelihood."""
    top = likelihoods.max(1, keepdims=True)
    each = np.exp(likelihoods - top)
    weights = np.full(each.shape[1], 1 / each.shape[1])
    for _ in range(_ROUNDS):
        parts = each * weights
        weights = (parts / parts.sum(1, keepdims=True)).mean(0) + _EACH
        weights /= weights.sum()
    return weights, float((np.log(each @ weights) + top[:, 0]).sum())


def _quantile(p: float, shares: np.ndarray, means: np.ndarray, deviations: np.ndarray) -> float:
    """Of a mixture of normal laws."""
    deviations = np.maximum(deviations, 1e-9)
    ends = means + deviations * special.ndtri(p)
    low, high = ends.min() - deviations.max(), ends.max() + deviations.max()

    def over(x: float) -> float:
        return float(shares @ special.ndtr((x - means) / deviations)) - p

    return float(optimize.root_scalar(over, bracket=(low, high), method="brentq").root)

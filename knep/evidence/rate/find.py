"""From range tests to a rate: trials around what they suggest, each seed's beside the same seed's at the default."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from knep.errors import InputError
from knep.evidence.rate.range_test import DOWN, Curve, range_test
from knep.evidence.rate.short_run import Problem
from knep.evidence.stats import Effect, paired
from knep.optim.batch_law import is_rate

SEEDS = 3
_AGREE = 10**0.5  # largest ratio between what two seeds of a range test suggest
_RATIO = 10**0.5  # between neighbouring trials, halved in the end
_NEAR = 3.2  # factor around the best rate within which trials tell where the lowest point lies
_MOST = 9  # rates tried beside the default
SHARE = 5  # a trial is this part of a run
_LEAST = 100  # steps, and no shorter


class _Loss(Callback):
    """The validation loss of the last epoch, infinite where there was none, or no number."""

    def __init__(self) -> None:
        self.value = math.inf

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = float(trainer.callback_metrics.get("val/loss", math.inf))
        self.value = value if math.isfinite(value) else math.inf


@dataclass
class Found:
    """What was seen. default: the rate that the config has; curves: of the range test, one a seed.

    agreed: what their seeds suggest, None where they do not agree; steps: of a trial; losses: rate -> validation loss
    of each seed, infinite where it diverged; suggestion: the rate of the least loss, between trials by a parabola.
    """

    default: float
    curves: Sequence[Curve]
    agreed: float | None
    steps: int
    losses: dict[float, list[float]] = field(default_factory=dict)
    suggestion: float = 0.0

    @property
    def best(self) -> float:
        """The tried rate of the least mean loss."""
        return min(self.losses, key=lambda rate: statistics.fmean(self.losses[rate]))

    @property
    def against_default(self) -> Effect | None:
        """The loss at the best tried rate minus that at the default, by pairs of a seed; None where one diverged."""
        ours, theirs = self.losses[self.best], self.losses[self.default]
        return paired(ours, theirs) if all(map(math.isfinite, ours + theirs)) else None

    @property
    def rate(self) -> float:
        """The rate to train with: the suggestion, or the default where no trial was better than that."""
        return self.default if self.best == self.default else self.suggestion


def suggestions(curves: Sequence[Curve]) -> list[float]:
    """What the range test of each seed suggests, those left out that find nothing.

    The geometric mean of the rate at which the loss falls fastest and a tenth of that at which it is least.
    """
    seen = [(curve.steepest, curve.lowest) for curve in curves]
    return [(steep * low / 10) ** 0.5 for steep, low in seen if steep is not None and low is not None]


def agreed(curves: Sequence[Curve]) -> float | None:
    """What range tests of several seeds suggest together; None where one finds nothing or they do not agree."""
    found = suggestions(curves)
    if not found or len(found) < len(curves) or max(found) > _AGREE * min(found):
        return None
    return statistics.geometric_mean(found)


def find(
    problem: Problem,
    seeds: int = SEEDS,
    share: int = SHARE,
    told: Callable[[str], None] = lambda line: None,
    most: int = _MOST,
) -> Found:
    """Range tests, then trials: climbs from what they suggest until both neighbours of the best are worse.

    told: called with a line after each test and trial; most: rates tried beside the default.
    Raises InputError where every rate diverges.
    """
    default = rate_of(problem.config)
    curves = []
    for seed in range(seeds):
        curve = range_test(problem, rates(problem.config, DOWN), default, seed)
        curves.append(curve)
        told(f"range test, seed {seed}: falls fastest at {_said(curve.steepest)}, lowest at {_said(curve.lowest)}")
    common, each = agreed(curves), suggestions(curves)
    steps = min(problem.total, max(_LEAST, problem.total // share))
    found = Found(default, curves, common, steps)
    start = statistics.geometric_mean(each) if each else default
    told(f"suggested: {start:.3g}" if common else f"the seeds suggest no common rate: the trials begin at {start:.3g}")

    def try_at(rate: float) -> float:
        if rate not in found.losses:
            found.losses[rate] = [trial(problem, rate, seed, steps) for seed in range(seeds)]
            told(f"rate {rate:.3g}: validation loss {statistics.fmean(found.losses[rate]):.4g} after {steps} steps")
        return statistics.fmean(found.losses[rate])

    try_at(default)
    climb(try_at, start, _RATIO, most - 2)
    if not math.isfinite(statistics.fmean(found.losses[found.best])):
        raise InputError("every rate that was tried diverges: knep doctor looks for the reason")
    for side in (-0.5, 0.5):
        try_at(found.best * _RATIO**side)
    found.suggestion = refined(found.losses, found.best)
    return found


def climb(loss: Callable[[float], float], start: float, ratio: float, most: int) -> float:
    """The rate of a grid through `start` whose two neighbours are worse, or the best of `most` of them."""
    tried = {0: loss(start)}
    while len(tried) < most:
        best = min(tried, key=lambda k: tried[k])
        missing = [k for k in (best - 1, best + 1) if k not in tried]
        if not missing:
            break
        tried[missing[0]] = loss(start * ratio ** missing[0])
    return start * ratio ** min(tried, key=lambda k: tried[k])


def refined(losses: Mapping[float, Sequence[float]], best: float) -> float:
    """The lowest point of a parabola through the logarithms of rates and mean losses around the best of them.

    By least squares over all that were tried within _NEAR of it, so that the noise of one trial moves it little; never
    beyond those, and `best` itself where they bend the other way.
    """
    near = {rate: statistics.fmean(values) for rate, values in losses.items() if best / _NEAR <= rate <= best * _NEAR}
    near = {rate: mean for rate, mean in near.items() if math.isfinite(mean) and mean > 0}
    if len(near) < 4:
        return best
    x, y = np.log(list(near)), np.log(list(near.values()))
    bend, slope, _ = np.polyfit(x - math.log(best), y, 2)
    if bend <= 0:
        return best
    return float(np.clip(best * math.exp(-slope / (2 * bend)), min(near), max(near)))


def trial(problem: Problem, rate: float, seed: int, steps: int) -> float:
    """The validation loss after a short run at a rate, its schedule as long as itself."""
    watcher = _Loss()
    problem.fit(rates(problem.config, rate / rate_of(problem.config)), steps, seed, watcher)
    return watcher.value


def rate_of(config: Mapping[str, object]) -> float:
    """`optimizer.lr` of a composed config."""
    node = config["optimizer"]
    assert isinstance(node, Mapping)
    return float(node["lr"])


def rates(config: Mapping[str, object], factor: float) -> dict[str, float]:
    """Every rate of the optimizer times a factor: rules such as Muon have a second one, for vectors."""
    node = config["optimizer"]
    assert isinstance(node, Mapping)
    return {f"optimizer.{key}": value * factor for key, value in node.items() if is_rate(str(key), value)}


def _said(rate: float | None) -> str:
    return "no rate" if rate is None else f"{rate:.3g}"

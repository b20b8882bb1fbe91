"""What is known of a run so far: its losses, its looks, its validations, and the order of its labels."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from knep.doctor.model.gradient_flow import looks_drawn
from knep.observe.layer_stats import Look

_EARLY, _LATE = 6, 40  # looks that are kept whole: the first and the last ones
LABELS = 60  # first batches whose labels are counted; behind them, those of looks are
WINDOW, SPIKE = 50, 10.0  # steps that a loss is compared with, and the robust z-score of a leap


@dataclass
class Stream:
    """losses: of each step; looks: the first and the last ones; updates, norms, rates, sizes: of every look, (step,
    median ||dw|| / ||w||), (step, ||gradient||), (step, largest learning rate), (step, ||w||); vals: (step, loss,
    accuracy), NaN where not given; labels: the share of the commonest class in each of the first batches, counted:
    their labels by class; absent: parameters that the optimizer does not have; frozen: those without requires_grad,
    fresh: of them, what looks like a random start; bad_input: the step of the first input that is not finite; leaps:
    (step, robust z-score) of losses far above those before them; lowest: the lowest median of 20 losses; since: the
    step at which the rate was last changed from outside; fired: units (C,) of each rectifier above 0, in its last
    three looks.
    """

    losses: array[float] = field(default_factory=lambda: array("d"))
    accs: dict[int, float] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    updates: list[tuple[int, float]] = field(default_factory=list)
    norms: list[tuple[int, float]] = field(default_factory=list)
    rates: list[tuple[int, float]] = field(default_factory=list)
    sizes: list[tuple[int, float]] = field(default_factory=list)
    clips: list[tuple[int, float]] = field(default_factory=list)
    capped: list[float] = field(default_factory=list)  # the gradient's norm behind what shortened all of it alike
    vals: list[tuple[int, float, float]] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    counted: Counter[int] = field(default_factory=Counter)
    absent: tuple[str, ...] = ()
    foreign: int = 0  # tensors of the optimizer that are not the model's
    frozen: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    adaptive: bool = False  # the optimizer has betas, as Adam has
    blind: bool = False  # no loss is told
    bad_input: int | None = None  # the step at which an input was not finite
    bad_share: float = 0.0
    bad_target: int | None = None  # the step at which a target was not
    leaps: list[tuple[int, float]] = field(default_factory=list)
    lowest: float = math.inf
    since: int = 0
    _read: int = 0
    _windows: int = 0
    fired: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def meet(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Parameters that cannot learn: frozen, or unknown to the optimizer."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = dict(model.named_parameters())
        self.adaptive = any("betas" in group for group in optimizer.param_groups)
        self.absent = tuple(n for n, p in named.items() if p.requires_grad and id(p) not in known)
        self.foreign = len(known - {id(p) for p in named.values()})
        self.frozen = tuple(n for n, p in named.items() if not p.requires_grad)
        self.fresh = tuple(n for n in self.frozen if fresh(named[n]))

    def take(self, look: Look) -> None:
        """A look that is closed."""
        self.looks.append(look)
        if len(self.looks) > _EARLY + _LATE:
            del self.looks[_EARLY]
        for layer in look.layers:
            if layer.alive is not None:
                self.fired.setdefault(layer.path, []).append((look.step, layer.alive))
                del self.fired[layer.path][:-3]
                layer.alive = None
        if look.weights:
            self.updates.append((look.step, look.update))
            self.norms.append((look.step, look.grad_norm))
            self.sizes.append((look.step, math.hypot(*(w.weight_norm for w in look.weights if w.matrix))))
        if look.rates:
            self.rates.append((look.step, max(rate for rate, _, _ in look.rates)))
        if look.clipped is not None:
            self.clips.append((look.step, look.clipped))
            if look.evenly and look.clipped < 1:
                self.capped.append(look.grad_norm)

    def advance(self) -> None:
        """Goes on through the losses that came since the last call: leaps, and the lowest window."""
        losses = self.losses
        while self._read < len(losses) - 1:  # a leap is told by what follows it
            i = self._read
            before = losses[max(0, i - WINDOW) : i]
            if len(before) >= 20 and losses[i] > max(before) and losses[i + 1] < losses[i]:
                z = (losses[i] - middle(before)) / max(spread(before), 0.1)
                if z > SPIKE:
                    self.leaps.append((i, z))
            self._read += 1
        while self._windows + 20 <= len(losses):
            self.lowest = min(self.lowest, middle(finite(losses[self._windows : self._windows + 20]) or [math.inf]))
            self._windows += 20

    def label(self, y: Tensor) -> None:
        if len(self.labels) < 10 * LABELS and y.ndim == 1 and len(y) and not y.is_floating_point():
            counts = Counter(y.tolist())
            self.labels.append(max(counts.values()) / len(y))
            self.counted.update(counts)

    def steps_since(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Updates and rates of the looks since the last change from outside."""
        kept = ([(step, v) for step, v in series if step >= self.since] for series in (self.updates, self.rates))
        updates, rates = kept
        return updates, rates

    @property
    def momentum(self) -> float:
        return max((m for look in self.looks[-1:] for _, m, _ in look.rates), default=0.0)

    @property
    def decay(self) -> tuple[float, float]:
        """The largest weight decay of the last look; and times its learning rate: what a step takes off, relative."""
        groups = [(decay, rate * decay) for look in self.looks[-1:] for rate, _, decay in look.rates]
        return max((d for d, _ in groups), default=0.0), max((t for _, t in groups), default=0.0)

    @property
    def start(self) -> float:
        """The loss at the start: the first one, or the median of the first five where that is lower."""
        early = finite(self.losses[:5])
        return min(early[0], middle(early)) if early else math.nan

    def recent(self, steps: int) -> list[float]:
        return finite(self.losses[-steps:])

    def measured(self) -> dict[str, Any]:
        """Plain data for figures and JSON."""
        found: dict[str, Any] = {}
        if self.looks:
            look = next((k for k in reversed(self.looks) if k.layers and k.whole), self.looks[-1])
            start = next((k for k in self.looks if k.layers and k.whole), look)
            found["signals"] = _plain(look)
            found["signals_at_start"] = _plain(start)
        found["trial"] = {
            "losses": [] if self.blind else list(self.losses),
            "accs": list(self.accs.values()),
            "updates": [list(pair) for pair in self.updates],
            "norms": [norm for _, norm in self.norms],
            "curve": [list(row) for row in self.vals],
        }
        return found


def _plain(look: Look) -> dict[str, Any]:
    weights = [w.plain() for w in look.weights if w.matrix]
    return {"step": look.step, "layers": [layer.plain() for layer in look.layers], "weights": weights}


def fresh(p: Tensor) -> bool:
    """Whether a frozen parameter could be as it was drawn; a part of a large matrix tells, for the time of a step."""
    return p.ndim > 1 and looks_drawn(p.detach().flatten(1)[:256, :1024])


def finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def middle(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """1.4826 times the median absolute deviation: the deviation of a normal distribution (Hampel 1974)."""
    centre = middle(values)
    return 1.4826 * middle([abs(v - centre) for v in values])

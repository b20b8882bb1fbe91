"""`scheduler`: the learning rate over steps. `f(optimizer, *, total_steps, steps_per_epoch, **hp) -> LRScheduler`.

Each option scales every parameter group's own rate by one factor of the step; `.step()` follows each optimizer step
(`plateau`: each validation). With t the step, N = total_steps and T = round(warmup * N), options with `warmup` rise
as (t + 1) / T for t < T, those with a `start` in [0, 1] as start + (1 - start) t / T where it is given. Then
u = (t - T) / (N - T), in [0, 1), is the share of the rest that is over. `final` is a share of the base rate. Every
function raises InputError for a hyper-parameter outside its range.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from knep.optim.schedules import CycledMomentum, Unchanged, ramp, staircase, warmed, warmup_steps
from knep.utils.validation import check

__all__ = [
    "constant",
    "cosine",
    "cosine_restarts",
    "cyclic",
    "exponential",
    "inverse_sqrt",
    "linear",
    "multistep",
    "none",
    "one_cycle",
    "plateau",
    "polynomial",
    "step",
    "warmup_stable_decay",
]


def none(optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> LRScheduler:
    """Leaves the rate as the optimizer has it."""
    return Unchanged(optimizer)


def constant(optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int, warmup: float = 0.05) -> LRScheduler:
    """Keeps the rate at 1 after the warm-up. warmup: share of all steps, in [0, 1)."""
    return warmed(optimizer, warmup_steps(total_steps, warmup), lambda s: 1.0)


def exponential(
    optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int, gamma: float = 0.98, warmup: float = 0.0
) -> LRScheduler:
    """Multiplies the rate by gamma after each epoch: gamma ** epoch. gamma: factor an epoch, in (0, 1]."""
    check("gamma", gamma, "(0, 1]")
    return staircase(optimizer, warmup_steps(total_steps, warmup), steps_per_epoch, lambda epoch: gamma**epoch)


def step(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    every: int = 10,
    gamma: float = 0.1,
    warmup: float = 0.0,
) -> LRScheduler:
    """Multiplies the rate by gamma each `every` epochs: gamma ** (epoch // every).

    every: epochs, in [1, inf); gamma: in (0, 1]; warmup: share of all steps.
    """
    check("every", every, "[1, inf)")
    check("gamma", gamma, "(0, 1]")
    warm = warmup_steps(total_steps, warmup)
    return staircase(optimizer, warm, steps_per_epoch, lambda epoch: gamma ** (epoch // every))


def multistep(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
    warmup: float = 0.0,
) -> LRScheduler:
    """Multiplies the rate by gamma at each milestone, from the first epoch that begins at or after it.

    He et al. 2016, sec. 4.2: at a half and three quarters of the training.

    milestones: shares of all epochs, each in (0, 1); gamma: in (0, 1]; warmup: share of all steps.
    """
    for share in milestones:
        check("each of milestones, a share of all epochs,", share, "(0, 1)")
    check("gamma", gamma, "(0, 1]")
    marks = [share * total_steps - 1e-6 for share in milestones]  # 0.7 * 10 is a little more than 7
    warm = warmup_steps(total_steps, warmup)
    return staircase(
        optimizer, warm, steps_per_epoch, lambda epoch: gamma ** sum(epoch * steps_per_epoch >= m for m in marks)
    )


def cosine(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup: float = 0.05,
    final: float = 0.0,
    start: float | None = None,
    prefix: bool = True,
    by_epoch: bool = False,
) -> LRScheduler:
    """Lowers the rate along half a cosine: final + (1 - final) (1 + cos(pi u)) / 2 (Loshchilov and Hutter 2017, eq. 5).

    warmup: share of all steps; final: share of the base rate at u = 1, in [0, 1]; start: share at the first step.
    prefix: whether the cosine begins behind the warm-up; False has u = t / N, whose first T steps the warm-up replaces,
    which is timm's default. by_epoch: whether an epoch keeps the rate of its first step, as timm's and torchvision's
    scripts have it.
    """
    _check_start(start)
    check("final", final, "[0, 1]")
    check("steps_per_epoch", steps_per_epoch, "[1, inf)")
    warm = warmup_steps(total_steps, warmup)
    first = warm if prefix else 0

    def factor(step: int) -> float:
        t = step // steps_per_epoch * steps_per_epoch if by_epoch else step
        rise = ramp(t, warm, start)
        if t < warm and not prefix:
            return rise
        return rise * _half_cosine(min(1.0, max(0, t - first) / (total_steps - first)), final)

    return LambdaLR(optimizer, factor)


def _half_cosine(u: float, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * u)) / 2


def _check_start(start: float | None) -> None:
    if start is not None:
        check("start", start, "[0, 1]")


def cosine_restarts(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    cycles: int = 3,
    growth: float = 2.0,
    warmup: float = 0.0,
    final: float = 0.0,
) -> LRScheduler:
    """Lowers the rate along half a cosine, `cycles` times over, each time `growth` times longer (SGDR, eq. 5).

    Loshchilov and Hutter 2017. The lengths fill the run, so that it ends at the end of a cycle: with c the length of
    the first, c (1 + growth + growth^2 + ...) = N - T steps.

    cycles: in [1, inf); growth: in [1, inf); warmup: share of all steps; final: share of the base rate, in [0, 1].
    """
    check("cycles", cycles, "[1, inf)")
    check("growth", growth, "[1, inf)")
    check("final", final, "[0, 1]")
    warm = warmup_steps(total_steps, warmup)
    lengths = [growth**k for k in range(int(cycles))]
    starts = [0.0, *accumulate(lengths)]
    scale = (total_steps - warm) / starts[-1]

    def curve(s: int) -> float:
        at = min(s / scale, starts[-1])
        k = max(i for i, start in enumerate(starts[:-1]) if start <= at + 1e-9)
        return _half_cosine((at - starts[k]) / lengths[k], final)

    return warmed(optimizer, warm, curve)


def linear(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup: float = 0.05,
    final: float = 0.0,
    start: float | None = None,
) -> LRScheduler:
    """Lowers the rate along a line: 1 - (1 - final) u.

    warmup: share of all steps; final: in [0, 1]; start: share of the base rate at the first step, in [0, 1].
    """
    _check_start(start)
    check("final", final, "[0, 1]")
    warm = warmup_steps(total_steps, warmup)
    length = total_steps - warm
    return warmed(optimizer, warm, lambda s: final + (1 - final) * max(0.0, 1 - s / length), start)


def polynomial(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    power: float = 2.0,
    warmup: float = 0.05,
    final: float = 0.0,
) -> LRScheduler:
    """Lowers the rate as a power of what is left: final + (1 - final) (1 - u) ** power (Chen et al. 2018, DeepLab).

    power: in (0, inf); warmup: share of all steps; final: share of the base rate, in [0, 1].
    """
    check("power", power, "(0, inf)")
    check("final", final, "[0, 1]")
    warm = warmup_steps(total_steps, warmup)
    length = total_steps - warm
    return warmed(optimizer, warm, lambda s: final + (1 - final) * max(0.0, 1 - s / length) ** power)


def one_cycle(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup: float = 0.3,
    start: float = 0.04,
    final: float = 4e-6,
    cycle_momentum: bool = True,
    momentum_low: float = 0.85,
    momentum_high: float = 0.95,
) -> LRScheduler:
    """Raises the rate from `start` to 1, then lowers it to `final`, along half cosines; momentum goes the other way.

    Smith and Topin 2019, in the form of `torch.optim.lr_scheduler.OneCycleLR`, which it equals where that is defined:
    the peak is at step warmup * N - 1, `final` is reached at step N - 1.

    warmup: share of all steps that rise, in [0, 1); start, final: shares of the base rate, in [0, 1];
    cycle_momentum: False leaves momentum alone; momentum_low, momentum_high: its values at the peak and at both ends,
    in [0, 1).
    """
    check("start", start, "[0, 1]")
    check("final", final, "[0, 1]")
    check("momentum_low", momentum_low, "[0, 1)")
    check("momentum_high", momentum_high, "[0, 1)")
    warmup_steps(total_steps, warmup)
    peak = max(warmup * total_steps - 1, 0.0)

    def between(at_step: int, first: float, middle: float, last: float) -> float:
        if at_step <= peak:
            share, low, high = at_step / peak if peak else 1.0, first, middle
        else:
            share, low, high = min(1.0, (at_step - peak) / max(total_steps - 1 - peak, 1e-9)), middle, last
        return high + (low - high) / 2 * (1 + math.cos(math.pi * share))

    def rate(t: int) -> float:
        return between(t, start, 1.0, final)

    if not cycle_momentum:
        return LambdaLR(optimizer, rate)
    return CycledMomentum(optimizer, rate, lambda t: between(t, momentum_high, momentum_low, momentum_high))


def warmup_stable_decay(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup: float = 0.05,
    decay: float = 0.2,
    final: float = 0.0,
) -> LRScheduler:
    """Holds the rate at 1, then lowers it along a line over the last D = round(decay * N) steps (Haegele et al. 2024).

    From step N - D on: final + (1 - final) (N - t) / D.

    warmup, decay: shares of all steps, in [0, 1), together at most 1; final: share of the base rate, in [0, 1].
    """
    check("decay", decay, "[0, 1)")
    check("warmup + decay", warmup + decay, "[0, 1]")
    check("final", final, "[0, 1]")
    warm = warmup_steps(total_steps, warmup)
    fall = max(1, min(round(decay * total_steps), total_steps - warm)) if decay else 0

    def factor(t: int) -> float:
        left = max(0, total_steps - t)
        return final + (1 - final) * left / fall if left < fall else ramp(t, warm)

    return LambdaLR(optimizer, factor)


def inverse_sqrt(optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int, warmup: float = 0.05) -> LRScheduler:
    """Lowers the rate as 1 / sqrt of the steps taken: sqrt(T / (t + 1)) after the warm-up, T at least 1.

    Vaswani et al. 2017, eq. 3, scaled so that its peak is 1. warmup: share of all steps.
    """
    warm = max(1, warmup_steps(total_steps, warmup))
    return LambdaLR(optimizer, lambda t: min((t + 1) / warm, math.sqrt(warm / (t + 1))))


def cyclic(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    half_cycle: float = 2.0,
    low: float = 0.1,
    decay: float = 1.0,
) -> LRScheduler:
    """Moves the rate up and down between `low` and 1 along lines, `half_cycle` epochs each way (Smith 2017).

    With `decay` the height above `low` is multiplied by it after each cycle: 1 is the paper's "triangular", 0.5 its
    "triangular2". Equals `torch.optim.lr_scheduler.CyclicLR`. It starts at `low` and has no other warm-up.

    half_cycle: epochs, in (0, inf), rounded to steps, at least one; low: share of the base rate, in [0, 1];
    decay: in (0, 1].
    """
    check("half_cycle", half_cycle, "(0, inf)")
    check("low", low, "[0, 1]")
    check("decay", decay, "(0, 1]")
    half = max(1, round(half_cycle * steps_per_epoch))

    def factor(t: int) -> float:
        cycle, within = divmod(t, 2 * half)
        return low + (1 - low) * (1 - abs(within / half - 1)) * decay**cycle

    return LambdaLR(optimizer, factor)


def plateau(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    factor: float = 0.3,
    patience: int = 5,
    threshold: float = 1e-4,
    final: float = 1e-3,
    mode: Literal["min", "max"] = "min",
) -> ReduceLROnPlateau:
    """Multiplies the rate by `factor` when the metric has not improved for more than `patience` validations.

    torch's own, stepped once a validation with the metric; it has no warm-up, since its steps are validations.

    factor: in (0, 1); patience: validations, in [0, inf); threshold: relative improvement that counts, in [0, 1);
    final: least rate, as a share of the base rate, in [0, 1]; mode: "min" for a metric that should fall, or "max".
    """
    check("factor", factor, "(0, 1)")
    check("patience", patience, "[0, inf)")
    check("threshold", threshold, "[0, 1)")
    check("final", final, "[0, 1]")
    floors = [final * group["lr"] for group in optimizer.param_groups]
    return ReduceLROnPlateau(
        optimizer, mode, factor=factor, patience=patience, threshold=threshold, min_lr=floors, eps=0.0
    )

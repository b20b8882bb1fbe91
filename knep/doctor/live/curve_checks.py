"""Findings that the course of a run shows: its losses, steps, weights and validations."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator

from knep.doctor.findings import Finding, finding
from knep.doctor.live.history import Stream, finite, middle, spread

_WINDOW = 20  # steps of a smoothed loss
_HUGE, _LARGE, _USUAL, _SMALL = 0.3, 0.03, 1e-3, 3e-5  # ||dw|| / ||w|| of a step; healthy is about 1e-4 to 3e-2
_FORGETS = 0.1  # of it: what was learned is lost within ten steps
_CALM = 0.01  # of it, in the first steps of a rate that is prescribed
_MOMENTUM, _PROUD = 0.9, 0.98  # momentum beyond what recipes use
_HIGH = 20.0  # robust z-score from which a single leap is enough
_THROTTLED = 0.1
_ERASED = 0.5
_STRONG, _BRIEF = 0.1, 2e-3  # weight decay, and with the learning rate: memory of fewer than 500 steps


def courses(stream: Stream, ended: bool = False) -> Iterator[Finding]:
    """What the course so far shows. ended: whether the run is over, which some findings wait for."""
    if stream.blind:
        return
    turned = [*_falls_without_end(stream)]
    if turned:
        yield from turned
        return
    for judge in (_rate_too_high, _rate_too_low, _throttled, _erased, _spikes, _overfits):
        yield from judge(stream)
    if ended:
        yield from _no_decay(stream)


def _falls_without_end(stream: Stream) -> Iterator[Finding]:
    """A loss with the wrong sign. Likelihoods of densities fall below zero too, but not so far."""
    now, start = middle(stream.recent(_WINDOW)), stream.start
    if len(stream.losses) >= 2 * _WINDOW and now < -1000 * (1 + abs(start)):
        began = next(i for i, loss in enumerate(stream.losses) if loss < -10 * (1 + abs(start)))
        yield finding("inverted_loss", f"the loss went from {start:.3g} to {now:.3g}: it falls without end", 0.9, began)


def diverged(stream: Stream) -> int | None:
    """The step from which the loss is not finite to the end, or far above its start."""
    losses = stream.losses
    if not losses or stream.bad_input is not None or stream.bad_target is not None:
        return None
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad and (bad[-1] == len(losses) - 1 or len(bad) > 0.2 * len(losses)):
        return bad[0]
    recent, start = middle(stream.recent(_WINDOW)), stream.start
    limit = start + 0.5 * abs(start) + 0.5  # losses may be negative, as log-likelihoods of densities are
    if len(losses) >= _WINDOW and recent > limit:
        return next((i for i, loss in enumerate(losses) if not loss <= limit), 0)
    return None


def _rate_too_high(stream: Stream) -> Iterator[Finding]:
    began, lr = diverged(stream), _top(stream)
    update = middle(finite([u for _, u in stream.updates[-5:]]))
    if began is not None:
        last = stream.losses[-1]
        text = f"the loss goes from {stream.start:.3g} to {last:.3g} at a learning rate of {lr:.3g}"
        text += f", and a step changes the weights by {update:.1e} of their size" if math.isfinite(update) else ""
        if _at_once(stream, began):
            yield _spoilt(stream, began)
            return
        yield from _blamed(stream, text, 0.9 if began > 0 else 0.6, began)
        return
    looks = [(step, u) for step, u in stream.steps_since()[0] if step >= 5]
    recent = stream.recent(2 * _WINDOW)
    if len(looks) < 3 or len(recent) < _WINDOW:
        return
    # A step of a third of the weights forgets what they were; a tenth of that is too much where nothing is won.
    usual, start, most = middle([u for _, u in looks[-5:]]), stream.start, max(u for step, u in stream.updates[:8])
    now, shaken = middle(recent), _shaken(recent)
    quarters = [middle(recent[i * len(recent) // 4 :][: len(recent) // 4]) for i in range(4)]
    falls = usual < _FORGETS and quarters == sorted(quarters, reverse=True) and quarters[-1] < 0.97 * quarters[0]
    stuck = now > 0.9 * start and not falls
    swings = shaken > 0.3 * max(now, 0.1) and now > 0.3 * start and len(recent) == 2 * _WINDOW
    swings = swings and middle(recent[_WINDOW:]) > 0.9 * middle(recent[:_WINDOW])
    height = max(abs(start), start - stream.lowest)
    climbs = now - stream.lowest > (0.15 if stream.momentum >= _PROUD else 0.35) * height
    if usual > _HUGE or (usual > _LARGE and (stuck or swings)) or (most > _HUGE and stuck) or climbs:
        first = next((step for step, u in stream.updates if u > _LARGE), looks[0][0])
        text = (
            f"a step changes the weights by {usual:.1e} of their size, at most {most:.1e} (healthy: 1e-4 to 3e-2), at "
            f"a learning rate of {lr:.3g}; the loss is {now:.3g} after {start:.3g} at the start"
        )
        yield from _blamed(stream, text, 0.85 if stuck or usual > _HUGE else 0.7, first)


def _at_once(stream: Stream, began: int) -> bool:
    """Whether a loss was NaN or infinite from one step to the next, behind small steps and losses that did not grow."""
    before = stream.losses[max(0, began - 5) : began]
    if math.isfinite(stream.losses[began]) or not all(math.isfinite(loss) for loss in before):
        return False
    steps = [u for step, u in stream.updates if step < began]
    calm = (bool(steps) or not began) and all(u < _HUGE for u in steps[-5:])
    return calm and max(before, default=0.0) <= (stream.start + 0.5 * abs(stream.start) + 0.5 if before else 0.0)


def _spoilt(stream: Stream, began: int) -> Finding:
    before = finite(stream.losses[max(0, began - 10) : began])
    largest = max(finite([u for step, u in stream.updates if step < began]), default=math.nan)
    text = f"the loss is {stream.losses[began]:.3g} at step {began}"
    text += f", after {before[-1]:.3g} and a start of {stream.start:.3g}" if before else ", the first one"
    if math.isfinite(largest):
        text += f"; no step before changed the weights by more than {largest:.1e} of their size: it is not the rate"
    mend = f"look at the batch of step {began}, and at what takes log, sqrt, exp or a quotient of numbers near 0; "
    return finding(
        "nan_loss", text, 0.9, began, mend=f"{mend}leave out or clip what has no value, and skip such a step"
    )


def _shaken(losses: list[float]) -> float:
    """How far the losses of neighbouring steps differ: their deviation around any trend."""
    return spread([b - a for a, b in itertools.pairwise(losses)]) / math.sqrt(2)


def _blamed(stream: Stream, evidence: str, gravity: float, began: int) -> Iterator[Finding]:
    """The learning rate; and momentum before it, where that is higher than any recipe has it."""
    if stream.momentum >= _PROUD:
        text = (
            f"momentum {stream.momentum:g} makes a step {1 / (1 - min(stream.momentum, 0.9999)):.0f} gradients long; "
        )
        way = "optimizer.betas=[0.9,0.999]" if stream.adaptive else f"optimizer.momentum={_MOMENTUM}"
        yield finding("momentum_instability", text + evidence, min(1.0, gravity + 0.05), began, overrides=((way,),))
        gravity *= 0.8
    yield finding("lr_too_high", evidence, gravity, began, overrides=((f"optimizer.lr={_lower(stream):.1g}",),))


def _top(stream: Stream) -> float:
    """The largest learning rate since it was last changed from outside."""
    rates = stream.steps_since()[1] or stream.rates[-1:]
    return max((rate for _, rate in rates), default=math.nan)


def _lower(stream: Stream) -> float:
    """The rate at which the first steps would have changed the weights by `_CALM` of their size, at most a tenth."""
    updates, rates = stream.steps_since()
    steps = [u / rate for (_, u), (_, rate) in zip(updates[:3], rates[:3], strict=False) if rate > 0]
    largest = max(finite(steps), default=0.0)
    top = _top(stream)
    return min(top / 10, max(_CALM / largest, top * 1e-5)) if largest > 0 else top / 10


def _rate_too_low(stream: Stream) -> Iterator[Finding]:
    if len(stream.losses) < 2 * _WINDOW:
        return
    updates, rates = stream.steps_since()
    if not rates:
        return
    top = max(rate for _, rate in rates)
    usual = [u for (step, u), (_, rate) in zip(updates, rates, strict=False) if rate >= 0.5 * top and step]
    now, start = middle(stream.recent(_WINDOW)), stream.start
    rising = rates[-1][1] >= top and rates[0][1] < 0.5 * top  # a warm-up that may not be over
    if len(usual) < 3 or rising or not now > 0.8 * start:
        return
    if not top > 0:
        text = f"the learning rate is 0 in all of {len(stream.losses)} steps"
        yield finding("lr_too_low", text, 0.9, 0, overrides=(), mend="give the optimizer a learning rate above 0")
        return
    if middle(usual) < _SMALL and max(usual) < 30 * _SMALL:
        text = (
            f"a step changes the weights by {middle(usual):.1e} of their size (healthy: 1e-4 to 3e-2) at a learning "
            f"rate of {top:.3g}; the loss went from {start:.4g} to {now:.4g} in {len(stream.losses)} steps"
        )
        better = top * min(max(_USUAL / max(middle(usual), 1e-30), 10.0), 1000.0)
        yield finding("lr_too_low", text, 0.75, 0, overrides=((f"optimizer.lr={better:.1g}",),))


def _throttled(stream: Stream) -> Iterator[Finding]:
    shares = [share for step, share in stream.clips]
    if len(shares) < 4 or len(stream.losses) < _WINDOW:
        return
    usual, updates = middle(shares), middle([u for _, u in stream.updates])
    scaled = spread(shares) < 1e-3 * usual  # every step by the same factor: a loss scale, which is no clipping
    # What clips by norm leaves one norm; another one at each step is that of a gradient divided by hand.
    scaled |= len(stream.capped) == len(shares) and spread(stream.capped) > 0.05 * middle(stream.capped)
    if usual < _THROTTLED and max(shares) < 0.5 and not scaled and updates < 3e-4:
        text = f"clipping leaves {usual:.1%} of the gradient's norm (median of {len(shares)} looks)"
        text += f", and a step changes the weights by {updates:.1e} of their size"
        yield finding("clip_throttles", text, 0.85, stream.clips[0][0])


def _erased(stream: Stream) -> Iterator[Finding]:
    decay, taken = stream.decay
    if len(stream.sizes) < 3 or not decay:
        return
    first, last, steps = stream.sizes[0][1], stream.sizes[-1][1], len(stream.losses)
    now, start = middle(stream.recent(_WINDOW)), stream.start
    pull = decay * last / max(stream.norms[-1][1], 1e-30)  # the decay's gradient over the loss's, where it is one
    shrunk = last < _ERASED * first and (taken * steps > 0.35 or pull > 1) and not now < 0.5 * start
    forgets = decay >= _STRONG and taken > _BRIEF and steps > 100 and now > 0.1 * start
    if shrunk or forgets:
        began = next((step for step, size in stream.sizes if size < 0.8 * first), 0)
        text = (
            f"a step takes {taken:.1e} off the weights by a decay of {decay:.3g}; their norm went from {first:.3g} to "
            f"{last:.3g} in {steps} steps, and the loss from {start:.3g} to {now:.3g}"
        )
        yield finding(
            "weight_decay_too_large", text, 0.88, began, overrides=((f"optimizer.weight_decay={decay / 100:.3g}",),)
        )


def _spikes(stream: Stream) -> Iterator[Finding]:
    leaps = stream.leaps
    single = [z for _, z in leaps if z > _HIGH]
    if (len(leaps) >= 2 or single) and len(leaps) <= 0.1 * len(stream.losses):
        steps = ", ".join(str(i) for i, _ in leaps[:5])
        text = (
            f"the loss leaps at steps {steps}, up to {max(z for _, z in leaps):.0f} deviations above the steps before"
        )
        yield finding("loss_spikes", text, 0.7, leaps[0][0])


def _overfits(stream: Stream) -> Iterator[Finding]:
    vals = [(step, loss, acc) for step, loss, acc in stream.vals if math.isfinite(loss)]
    if len(vals) < 4:
        return
    best = min(range(len(vals)), key=lambda i: vals[i][1])
    after = vals[best + 1 :]
    train = middle(stream.recent(_WINDOW))
    worse = len(after) >= 3 and all(loss > 1.25 * vals[best][1] for _, loss, _ in after[-3:])
    if not worse or not train < 0.5 * after[-1][1]:
        return
    accs = [acc for _, _, acc in vals if math.isfinite(acc)]
    if accs and accs[-1] > max(accs) - 0.005:
        return
    text = (
        f"validation loss was {vals[best][1]:.3g} at step {vals[best][0]} and is {after[-1][1]:.3g}, while the "
        f"training loss is {train:.3g}"
    )
    yield finding("overfitting", text, 0.7, vals[best][0])


def _no_decay(stream: Stream) -> Iterator[Finding]:
    rates = [rate for _, rate in stream.rates]
    accs = [acc for _, _, acc in stream.vals if math.isfinite(acc)]
    late = accs[len(accs) // 2 :]
    if len(late) < 4 or not rates or rates[-1] < 0.9 * max(rates):
        return
    swings, trend = statistics.pstdev(late), abs(late[-1] - late[0])
    if swings > 0.02 and trend < 2 * swings and max(late) > 1.5 * min(min(accs), 0.5):
        text = (
            f"validation accuracy swings by {swings:.1%} over the last {len(late)} validations, at a learning rate "
            f"that stays at {rates[-1]:.3g}"
        )
        yield finding("no_decay", text, 0.5, stream.vals[len(stream.vals) - len(late)][0], certain=False)

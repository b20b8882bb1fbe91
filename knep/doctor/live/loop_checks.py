"""Findings that only a loop shows: what it forgets, and what it does too often."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from knep.doctor.findings import Finding, finding, named
from knep.doctor.live.history import Stream, middle
from knep.doctor.live.loop_state import Loop

_DEAD = 0.01  # of the highest rate: a run goes on for long at less only where its schedule went wrong
_EARLY, _AFTER = 64, 20  # steps within which a rate fell, where no epoch is known; and that came behind it
_EPOCHS = 5  # within which a rate that falls at each batch is gone where its decay was meant for epochs
_CLOSE = 8  # steps from its first fall to the next: fewer than an epoch's
_NEVER = 64  # steps without one of the optimizer: more than anybody accumulates
_EVAL = 10  # steps in eval mode
WHOLE = ("foreign_optimizer", "no_optimizer_step", "detached_loss", "gradients_dropped")  # none of the model learns


def habits(loop: Loop, stream: Stream) -> Iterator[Finding]:
    """What the loop shows so far."""
    for judge in (_other_model, _no_step, _unreached, _added, _schedule, _swinging_rate, _eval_mode, _train_mode):
        yield from judge(loop, stream)


def _other_model(loop: Loop, stream: Stream) -> Iterator[Finding]:
    if loop.missing and not loop.trains:
        text = f"none of the {loop.foreign} tensors of the optimizer is one of the model's {len(loop.missing)}"
        yield finding("foreign_optimizer", text, 0.97, 0, layers=loop.missing)


def _no_step(loop: Loop, stream: Stream) -> Iterator[Finding]:
    if len(loop.rates) >= _NEVER and not loop.steps and loop.learns:
        yield finding("no_optimizer_step", f"optimizer.step() ran in none of {len(loop.rates)} steps", 0.96, 0)


_WHY = {
    "dropped": "gradients arrived and were gone before optimizer.step(): zero_grad() stands between backward and it",
    "leaf": "the loss has no graph, and was made to require a gradient by hand",
    "other": "the graph of the loss ends in other tensors than the model's parameters",
    "unknown": "no gradient reached any parameter of the model",
}


def _unreached(loop: Loop, stream: Stream) -> Iterator[Finding]:
    last = [k.step for k in stream.looks if k.weights][-1:]
    if len(loop.unreached) < 2 or not last or loop.unreached[-1][0] != last[0]:
        return
    began, why = loop.unreached[0]
    name = "gradients_dropped" if why == "dropped" else "detached_loss"
    yield finding(name, f"{_WHY[why]} (seen at {len(loop.unreached)} steps)", 0.96, began)


def _added(loop: Loop, stream: Stream) -> Iterator[Finding]:
    seen = sorted(step for step, added in loop.added.items() if added)
    if len(seen) >= 2 and seen[-1] == max(loop.added):
        steps = ", ".join(map(str, seen[:4])) + (" ..." if len(seen) > 4 else "")
        text = f"at steps {steps} the gradient holds that of the step before: no zero_grad() ran between the two"
        yield finding("gradients_add_up", text, 0.95, seen[0])


def _schedule(loop: Loop, stream: Stream) -> Iterator[Finding]:
    """A rate that was gone before the first epoch was over, while the run goes on and on."""
    rates = loop.rates[stream.since :]
    if len(rates) < _AFTER or not max(rates) > 0:
        return
    top = max(rates)
    alive = max(i for i, rate in enumerate(rates) if rate > 1.01 * _DEAD * top)
    gone, after = alive + 1, len(rates) - alive - 1
    falls = [i for i, (a, b) in enumerate(itertools.pairwise(rates[: gone + 1])) if b < a]
    low = middle(stream.recent(_AFTER)) < 0.1 * stream.start  # nothing was missed
    if after < gone + _AFTER or len(falls) < 2 or low:
        return
    steadily = len(falls) > 0.5 * gone  # at each batch: what is meant by epochs falls once in each
    if gone > (_EPOCHS if steadily else 1) * (loop.epoch or _EARLY):
        return
    if not loop.epoch and falls[1] - falls[0] > _CLOSE:
        return
    began, then = (
        gone + 1 + stream.since,
        min(2 * gone + 2, max(loop.epoch, gone + 2) if loop.epoch else 2 * gone + 2) - 1,
    )
    when = "within the first epoch" if loop.epoch else "sooner than an epoch is over"
    when = f"by epoch {gone / loop.epoch:.2g}" if 0 < loop.epoch < gone else when
    text = (
        f"the learning rate {_fall(top, rates[then])} within {then + 1} steps, {when}: the schedule is stepped "
        f"once a batch; {after} steps have gone by below a hundredth of it"
    )
    mend = (
        "call scheduler.step() once an epoch, behind the loop over batches, or give the schedule its lengths in steps"
    )
    yield finding("lr_too_low", text, 0.9, began, mend=mend)


def _swinging_rate(loop: Loop, stream: Stream) -> Iterator[Finding]:
    """A cosine that is over within a few epochs and comes back, as one does whose T_max counts epochs."""
    rates = loop.rates[stream.since :]
    top = max(rates, default=0.0)
    end = next((i for i, rate in enumerate(rates) if rate <= 1.01 * _DEAD * top), 0)
    if end < 3 or end > _EPOCHS * (loop.epoch or _EARLY) or len(rates) < max(4 * end, _AFTER) or rates[0] < 0.9 * top:
        return
    down, up = rates[: end + 1], rates[end : 2 * end + 2]  # behind steps: it ends one before T_max
    monotone = all(b <= a for a, b in itertools.pairwise(down)) and all(b >= a for a, b in itertools.pairwise(up))
    if not monotone or max(up) < 0.9 * top or up[1] > 0.6 * top:  # a restart leaps
        return
    text = (
        f"the learning rate {_fall(top, down[-1])} within {end} steps and rises again, over and over: the schedule is "
    )
    text += "stepped once a batch, and its length counts epochs"
    mend = "call scheduler.step() once an epoch, or give T_max in steps: epochs times the batches of one"
    yield finding("lr_too_low", text, 0.7, end + stream.since, mend=mend)


def _fall(top: float, low: float) -> str:
    return f"fell {top / low:.2g} times, from {top:.3g} to {low:.1e}," if low > 0 else f"fell from {top:.3g} to 0"


def _eval_mode(loop: Loop, stream: Stream) -> Iterator[Finding]:
    run = loop.eval_steps[-_EVAL:]
    if len(run) < _EVAL or run[-1] - run[0] != _EVAL - 1 or run[-1] != len(loop.rates) - 1 or not loop.depends:
        return
    steps = loop.eval_steps
    began = next(step for i, step in enumerate(steps) if run[-1] - step == len(steps) - 1 - i)
    earlier = "behind steps in train mode" if loop.trained else "from the first one on"
    text = f"steps {began} to {run[-1]} ran in eval mode, {earlier}; {named(loop.depends)} learn or drop nothing there"
    yield finding("eval_mode_in_training", text, 0.8 if loop.trained else 0.5, began, certain=loop.trained)


def _train_mode(loop: Loop, stream: Stream) -> Iterator[Finding]:
    if not loop.careless:
        return
    told, began = any(loop.careless.values()), min(loop.careless)
    if told or len(loop.careless) >= 2:
        text = (
            f"forwards of a validation ran in train mode behind step {began}, where {named(loop.depends)} act otherwise"
        )
        yield finding("train_mode_in_validation", text, 0.75 if told else 0.5, began, certain=told)

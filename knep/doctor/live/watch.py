"""The doctor beside a training loop: looks at some of its steps, and says what is wrong while the run goes on."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.doctor.findings import Finding, Report, line, ordered, ranked
from knep.doctor.live.curve_checks import courses
from knep.doctor.live.history import LABELS, Stream
from knep.doctor.live.loop_checks import WHOLE, habits
from knep.doctor.live.loop_state import Loop
from knep.doctor.live.step_checks import symptoms
from knep.errors import InputError
from knep.observe.step_observer import Eye, compiled, fused, takes_probabilities
from knep.surgery.record import hooks_on
from knep.utils.text import shortened

_PATIENCE = 64  # steps that a look waits for an optimizer that does not step
_FOLLOWS = ("cut_off", "lr_too_low", "clip_throttles")  # of weights that do not move at all
_WHOLE = 4  # looks from one that reads the signal of every layer to the next
_SPARSER, _SPARSEST = 16, 10  # looks are a 16th of the run apart, at most 10 times as far as at first


class Watch:
    """What `knep.doctor.watch` returns: open within its `with`.

    stream: what was seen; findings: by disease, all so far; looks: their number; now: the findings that the last look
    bears out; unread: what could not be read, in words; loop: what only a loop of one's own shows, None where knep runs
    it (told). cross_entropy: the loss is known to be the cross-entropy of the scores. door, told: as `Eye` has them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 10,
        on_finding: str | Callable[[Finding], None] = "warn",
        cross_entropy: bool = False,
        door: nn.Module | None = None,
        told: bool = False,
    ) -> None:
        check(model, optimizer, every, on_finding)
        self.stream, self.looks = Stream(), 0
        self.findings: dict[str, Finding] = {}
        self.now: tuple[Finding, ...] = ()
        self._model, self._optimizer, self._every, self._tell = model, optimizer, every, on_finding
        self.unread = ""
        self._door, self._told = model if door is None else door, told
        self.loop = None if told else Loop()
        self._cross_entropy = cross_entropy
        self._eye: Eye | None = None
        self._open = False
        self._held: Any = None
        self._kept: Tensor | None = None
        self._aim: Tensor | None = None  # the targets of the step
        self._waiting: list[Tensor] = []
        self._next = 0
        self._alarmed = False
        self._began = time.perf_counter()
        self._news: list[str] = []

    def __enter__(self) -> Watch:
        self.stream.meet(self._model, self._optimizer)
        if self.loop is not None:
            self.loop.meet(self._model, self._optimizer)
        self._open = True
        if not self._told and not compiled(self._door):
            (self._held,) = hooks_on([self._door], self._keep)
        self._look()
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._settle()
            self._open, self._kept = False, None
            if self._held is not None:
                self._held.remove()
            if self.loop is not None:
                self.loop.leave()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and torch.is_grad_enabled():
            self._kept = args[0]
        if self.loop is not None:
            self.loop.forward(module.training)

    def given(self, x: Tensor) -> None:
        """For those who told that they tell: the batch of this step, in place of what a hook on the model would see."""
        self._kept = x

    def arrived(self) -> None:
        """For those who told that they tell: the gradients of this step are whole, and not clipped yet."""
        if self._eye is not None:
            self._eye.arrived()

    def step(self, loss: Tensor | float | None, *, y: object = None, scores: object = None) -> None:
        """One step of training is over; called behind `optimizer.step()`.

        loss: of the step, a number or a tensor of one element, None where there is none to give: its course is not
        seen then; y: the targets of its batch, scores: what the model answered, as they are. Both are optional: with
        labels, int64 (N,), and scores (N, K) the doctor sees more. Raises InputError for a loss that is no number and
        for a watch that is closed.
        """
        if not self._open:
            raise InputError("step: this watch is closed: call it inside `with knep.doctor.watch(...) as d:`")
        y, scores = (t if isinstance(t, Tensor) else None for t in (y, scores))
        if loss is None:
            loss, self.stream.blind = 0.0, True
        self._aim = y
        if isinstance(loss, Tensor) and not loss.is_cpu:
            self._waiting.append(scalar(loss))
        else:
            self._take(number(loss))
        if y is not None and (scores is not None or self.wants_targets):
            self._learn(y, scores)
        steps = self.steps
        if self.loop is not None:
            self.loop.step(steps - 1)
        if self._eye is not None and (self._eye.stepped or steps - self._eye.look.step >= _PATIENCE):
            self._drain()
            self._close(y, scores, loss)
            self._judge()
        self._kept = None
        if steps >= self._next:
            self._look()

    def validate(self, *, loss: float = math.nan, acc: float = math.nan) -> None:
        """A validation after the steps so far: mean loss, accuracy in [0, 1]; either may be left out."""
        self.stream.vals.append((self.steps, float(loss), float(acc)))
        if self.loop is not None:
            self.loop.validated(self.steps)
        self._judge()

    @property
    def wants_targets(self) -> bool:
        """Whether targets of this step would be read."""
        return self._eye is not None or len(self.stream.labels) < LABELS

    @property
    def steps(self) -> int:
        return len(self.stream.losses) + len(self._waiting)

    def report(self) -> Report:
        """What was found so far, the gravest first."""
        self._drain()
        self._judge(ended=True)
        found, notes = ranked(self.findings.values()), ()
        if fused(self._model):
            notes = ("no layer was seen: torch.compile makes one graph of the model",)
        elif not any(look.layers for look in self.stream.looks):
            notes = ("no layer was seen: the model's hooks did not run",)
        if self.unread:
            notes = (*notes, f"not all could be read: {shortened(self.unread, 300)}")
        return Report(found, self.stream.measured(), time.perf_counter() - self._began, notes)

    def news(self) -> list[Finding]:
        """The findings since the last call."""
        new, self._news = self._news, []
        return [self.findings[name] for name in new if name in self.findings]

    def changed(self) -> None:
        """The rate, the momentum or the decay is another from here on: steps before say nothing about it."""
        self.stream.since = self.steps

    def failed(self) -> None:
        """The run ends with a step that is not finite, which `step` will not be told of."""
        self._drain()
        self._take(math.nan)
        self._judge()

    def _look(self) -> None:
        if self._eye is None:
            first, steps = self.looks < 2, self.steps
            whole = first or self.looks % _WHOLE == 0
            parts = self._model, self._optimizer
            self._eye = Eye(*parts, steps, first=first, whole=whole, door=self._door, told=self._told)
            self._next = following(steps, self._every)
            if self.loop is not None:
                self.loop.open(steps)

    def _close(self, y: Tensor | None, scores: Tensor | None, loss: Tensor | float) -> None:
        assert self._eye is not None
        answered = scores if scores is not None else self._eye.scores
        self.unread = self.unread or self._eye.failed
        look, self._eye = self._eye.close(), None
        if self._cross_entropy:
            look.doubled = look.probabilities
        elif y is not None and answered is not None:
            look.doubled = takes_probabilities(look, answered.detach(), y, self.stream.losses[-1])
        if self.loop is not None:
            self.loop.close(look, loss if isinstance(loss, Tensor) else None)
        self.stream.take(look)
        self.looks += 1

    def _learn(self, y: Tensor, scores: Tensor | None) -> None:
        self.stream.label(y)
        classes = scores is not None and scores.ndim == 2 and scores.shape[1] > 1 and not y.is_floating_point()
        if scores is not None and classes and y.ndim == 1 and len(scores) == len(y):
            right = scores.detach().argmax(1) == y.to(scores.device)
            self.stream.accs[self.steps - 1] = float(right.float().mean())

    def _drain(self) -> None:
        """Losses that wait on the device become numbers."""
        if self._waiting:
            values = torch.stack(self._waiting).tolist()
            self._waiting.clear()
            for value in values:
                self._take(value)

    def _take(self, value: float) -> None:
        self.stream.losses.append(value)
        if value - value != 0 and not self._alarmed:  # NaN or infinite
            self._alarmed = True
            self._suspect()
            self._judge()

    def _suspect(self) -> None:
        given = self._kept
        if isinstance(given, Tensor) and given.is_floating_point() and not bool(given.isfinite().all()):
            self.stream.bad_input = len(self.stream.losses) - 1
            self.stream.bad_share = 1 - float(given.isfinite().float().mean())
        elif self._aim is not None and self._aim.is_floating_point() and not bool(self._aim.isfinite().all()):
            self.stream.bad_target = len(self.stream.losses) - 1

    def _settle(self) -> None:
        """Ends the look that waits for its step; it counts where that was made."""
        self._drain()
        if self._eye is not None:
            look, stepped = self._eye.close(), self._eye.stepped
            self._eye = None
            if stepped:
                self.stream.take(look)

    def _judge(self, ended: bool = False) -> None:
        look = self.stream.looks[-1] if self.stream.looks else None
        if look and look.input and look.input.finite < 1 and self.stream.bad_input is None:
            self.stream.bad_input, self.stream.bad_share = look.step, 1 - look.input.finite
        self.stream.advance()
        loop = [] if self.loop is None else [*habits(self.loop, self.stream)]
        said = [*symptoms(self.stream), *courses(self.stream, ended)]
        if any(found.disease in WHOLE for found in loop):  # no weight moves: neither rate nor clipping is to blame
            said = [found for found in said if found.disease not in _FOLLOWS]
        self.now = ordered([*loop, *said])
        if any(found.disease == "sorted_batches" for found in self.now):
            self.findings.pop("constant_labels", None)  # the first class was a long one
        for found in self.now:
            known = self.findings.get(found.disease)
            self.findings[found.disease] = found if known is None else replace(found, began=known.began)
            if known is None:
                self._news.append(found.disease)
                self._say(self.findings[found.disease])

    def _say(self, finding: Finding) -> None:
        if callable(self._tell):
            self._tell(finding)
        elif self._tell == "warn":
            warnings.warn(line(finding), UserWarning, stacklevel=4)


def following(step: int, every: int) -> int:
    """The step of the look after that of `step`: 1, 2, 4, 8, ... below `every`, then every `every` steps, and later in
    a run at growing distance.
    """
    double = 1 if step == 0 else 1 << step.bit_length()
    if double < every:
        return double
    apart = min(max(1, step // _SPARSER // every), _SPARSEST)
    return (step // every + apart) * every


def number(loss: Any) -> float:
    """The loss as a number, from a number or a tensor of one element. Raises InputError for anything else."""
    if isinstance(loss, Tensor):
        return float(scalar(loss)) if loss.numel() != 1 or loss.is_complex() else loss.item()
    if isinstance(loss, bool) or not isinstance(loss, (int, float)):
        raise InputError(f"step: the loss is {type(loss).__name__}: give a number or a tensor of one element")
    return float(loss)


def scalar(loss: Tensor) -> Tensor:
    """The loss, 0-dim, as it lies on its device. Raises InputError for any other shape."""
    if loss.numel() != 1 or loss.is_complex():
        raise InputError(f"step: the loss has shape {tuple(loss.shape)}: give one real number, such as loss.mean()")
    return loss.detach().reshape(())


def check(model: Any, optimizer: Any, every: Any, on_finding: Any) -> None:
    """Raises InputError for what cannot be watched."""
    if not isinstance(model, nn.Module):
        raise InputError(f"watch: the model is {type(model).__name__}: give a torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise InputError(f"watch: {type(model).__name__} has no parameters, so nothing in it can learn: give a model")
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"watch: the optimizer is {type(optimizer).__name__}: give a torch.optim.Optimizer")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise InputError(f"watch: every={every} must be a whole number of steps, at least 1")
    if on_finding not in ("warn", "none") and not callable(on_finding):
        raise InputError(f"watch: on_finding={on_finding} is unknown: write warn, none or a function")

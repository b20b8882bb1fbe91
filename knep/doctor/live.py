"""The doctor beside a training loop: looks at some of its steps, and says what is wrong while the run goes on."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.doctor.courses import courses
from knep.doctor.findings import Finding, Report, ordered
from knep.doctor.hooks import Eye
from knep.doctor.readings import Look, fresh
from knep.doctor.stream import LABELS, Stream
from knep.doctor.symptoms import symptoms
from knep.errors import InputError

_PATIENCE = 64  # steps that a look waits for an optimizer that does not step
# Cause -> what follows from it: where both are found, what follows ranks below.
_BRINGS: Mapping[str, tuple[str, ...]] = {
    "non_finite_inputs": ("lr_too_high", "exploding_gradient", "loss_spikes", "momentum_instability"),
    "constant_inputs": ("signal_collapse", "lr_too_low"),
    "constant_labels": ("lr_too_low", "vanishing_gradient"),
    "unscaled_inputs": ("exploding_gradient", "lr_too_high", "dying_relu", "saturation", "stale_statistics"),
    "stale_statistics": ("overfitting",),
    "symmetric_weights": ("signal_collapse", "vanishing_gradient", "dying_relu", "lr_too_low"),
    "exploding_gradient": ("lr_too_high", "dying_relu", "saturation", "loss_spikes"),
    "saturation": ("vanishing_gradient", "lr_too_low"),
    "vanishing_gradient": ("lr_too_low", "signal_collapse"),
    "dying_relu": ("signal_collapse", "vanishing_gradient", "cut_off"),
    "momentum_instability": ("lr_too_high", "dying_relu", "saturation", "loss_spikes"),
    "lr_too_high": (
        "lr_too_low",
        "stale_statistics",
        "dying_relu",
        "saturation",
        "loss_spikes",
        "signal_collapse",
        "vanishing_gradient",
        "no_decay",
    ),
    "clip_throttles": ("lr_too_low",),
    "cut_off": ("lr_too_low",),
    "frozen_parameters": ("lr_too_low",),
    "sorted_batches": ("dying_relu", "lr_too_high", "loss_spikes", "no_decay", "stale_statistics"),
    "loss_spikes": ("dying_relu", "signal_collapse", "saturation"),
    "weight_decay_too_large": ("lr_too_high", "signal_collapse", "vanishing_gradient", "lr_too_low", "dying_relu"),
    "precision_underflow": ("lr_too_low",),
    "double_softmax": ("lr_too_low", "vanishing_gradient"),
}


def watch(
    model: nn.Module, optimizer: Optimizer, *, every: int = 10, on_finding: str | Callable[[Finding], None] = "warn"
) -> Watch:
    """Watches a loop of one's own: `with watch(model, optimizer) as d: ... optimizer.step(); d.step(loss)`.

    every: steps from one look to the next; the first looks are closer. on_finding: "warn" warns once for each disease,
    with the step at which it began; "none" keeps findings for `d.report()`; or a function that is given each Finding.
    The model, its gradients and the numbers of the training stay as they are. Raises InputError for what cannot be
    watched.
    """
    return Watch(model, optimizer, every=every, on_finding=on_finding)


class Watch:
    """What `watch` returns: open within its `with`.

    stream: what was seen; findings: by disease, all so far; looks: their number; now: the findings that the last look
    bears out. cross_entropy: the loss is known to be the cross-entropy of the scores.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 10,
        on_finding: str | Callable[[Finding], None] = "warn",
        cross_entropy: bool = False,
    ) -> None:
        _check(model, optimizer, every, on_finding)
        self.stream, self.findings = Stream(), {}
        self._model, self._optimizer, self._every, self._tell = model, optimizer, every, on_finding
        self._eye: Eye | None = None
        self._held: Any = None
        self._kept: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._next = 0
        self._alarmed = False
        self._began = time.perf_counter()
        self._cross_entropy = cross_entropy
        self.now: tuple[Finding, ...] = ()
        self.looks = 0
        self._news: list[str] = []

    findings: dict[str, Finding]

    def __enter__(self) -> Watch:
        self._parts()
        self._held = self._model.register_forward_pre_hook(self._keep)
        self._look()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._held is not None:
            self._settle(force=True)
            self._held.remove()
            self._held = self._kept = None

    def _parts(self) -> None:
        """Parameters that cannot learn: frozen, or unknown to the optimizer."""
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        named = dict(self._model.named_parameters())
        self.stream.adaptive = any("betas" in group for group in self._optimizer.param_groups)
        self.stream.absent = tuple(n for n, p in named.items() if p.requires_grad and id(p) not in known)
        self.stream.frozen = tuple(n for n, p in named.items() if not p.requires_grad)
        self.stream.fresh = tuple(n for n in self.stream.frozen if fresh(named[n]))

    def _keep(self, module: nn.Module, args: Any) -> None:
        if args and torch.is_grad_enabled():
            self._kept = args[0]

    def step(self, loss: Tensor | float, *, y: Tensor | None = None, scores: Tensor | None = None) -> None:
        """One step of training is over; called behind `optimizer.step()`.

        loss: of the step, a number or a tensor of one element; y: int64 (N,), the labels of its batch; scores: (N, K),
        what the model answered. Both are optional: with labels the doctor sees more. Raises InputError for a loss that
        is no number and for a watch that is closed.
        """
        if self._held is None:
            raise InputError("step: this watch is closed: call it inside `with knep.doctor.watch(...) as d:`")
        if isinstance(loss, Tensor) and not loss.is_cpu:
            self._waiting.append(_scalar(loss))
        else:
            self._take(_number(loss))
        if y is not None and (scores is not None or self._eye is not None or len(self.stream.labels) < LABELS):
            self._learn(y, scores)
        if self._eye is not None and (self._eye.stepped or self.steps - self._eye.look.step >= _PATIENCE):
            self._drain()
            self._close(y, scores)
            self._judge()
        self._kept = None
        if self.steps >= self._next:
            self._look()

    def validate(self, *, loss: float = math.nan, acc: float = math.nan) -> None:
        """A validation after the steps so far: mean loss, accuracy in [0, 1]; either may be left out."""
        self.stream.vals.append((self.steps, float(loss), float(acc)))
        self._judge()

    @property
    def steps(self) -> int:
        return len(self.stream.losses) + len(self._waiting)

    def report(self) -> Report:
        """What was found so far, the gravest first."""
        self._drain()
        self._judge(ended=True)
        notes = (
            () if any(k.layers for k in self.stream.looks) else ("no layer was seen: the model's hooks did not run",)
        )
        found = ranked(self.findings.values())
        return Report(found, self.stream.measured(), time.perf_counter() - self._began, notes)

    def news(self) -> list[Finding]:
        """The findings since the last call."""
        new, self._news = self._news, []
        return [self.findings[name] for name in new]

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
            self._eye = Eye(self._model, self._optimizer, self.steps, first=len(self.stream.looks) < 2)
            self._next = following(self.steps, self._every)

    def _close(self, y: Tensor | None, scores: Tensor | None) -> None:
        assert self._eye is not None
        answered = scores if scores is not None else self._eye.scores
        look, self._eye = self._eye.close(), None
        if self._cross_entropy:
            look.doubled = look.probabilities
        elif y is not None and answered is not None:
            look.doubled = self._doubled(look, answered.detach(), y)
        self.stream.take(look)
        self.looks += 1

    def _doubled(self, look: Look, scores: Tensor, y: Tensor) -> bool | None:
        """Whether the loss is the cross-entropy of probabilities as if they were scores."""
        if not look.probabilities or scores.ndim != 2 or len(scores) != len(y) or y.ndim != 1:
            return None
        if not 0 <= int(y.min()) <= int(y.max()) < scores.shape[1]:
            return None
        loss = self.stream.losses[-1]
        twice = float(F.cross_entropy(scores.float(), y.to(scores.device)))
        return abs(twice - loss) <= 0.02 * abs(twice)

    def _learn(self, y: Tensor, scores: Tensor | None) -> None:
        self.stream.label(y)
        if scores is not None and scores.ndim == 2 and y.ndim == 1 and len(scores) == len(y):
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

    def _settle(self, force: bool = False) -> None:
        self._drain()
        if self._eye is not None and force:
            look, stepped = self._eye.look, self._eye.stepped
            self._eye.close()
            self._eye = None
            if stepped:
                self.stream.take(look)

    def _judge(self, ended: bool = False) -> None:
        look = self.stream.looks[-1] if self.stream.looks else None
        if look and look.input and look.input.finite < 1 and self.stream.bad_input is None:
            self.stream.bad_input, self.stream.bad_share = look.step, 1 - look.input.finite
        self.stream.advance()
        self.now = ordered([*symptoms(self.stream), *courses(self.stream, ended)])
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


def line(finding: Finding) -> str:
    """A finding in one line."""
    return f"doctor: since step {finding.began}: {finding.about.title}: {finding.evidence}"


def ranked(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The gravest first; what follows from another finding behind it."""
    found = {f.disease: f for f in findings}
    for cause, effects in _BRINGS.items():
        for effect in effects:
            if cause in found and effect in found and (found[cause].began or 0) <= (found[effect].began or 0) + 20:
                below = min(found[effect].gravity, 0.8 * found[cause].gravity)
                found[effect] = replace(found[effect], gravity=below)
    if any(f.certain for f in found.values()):
        found.pop("no_decay", None)  # what swings has a better reason
    return ordered(list(found.values()))


def following(step: int, every: int) -> int:
    """The step of the look after that of `step`: 1, 2, 4, 8, ... below `every`, and then every `every` steps."""
    double = 1 if step == 0 else 1 << step.bit_length()
    return double if double < every else (step // every + 1) * every


def _number(loss: Any) -> float:
    """The loss as a number, from a number or a tensor of one element."""
    if isinstance(loss, Tensor):
        return float(_scalar(loss)) if loss.numel() != 1 or loss.is_complex() else loss.item()
    if isinstance(loss, bool) or not isinstance(loss, (int, float)):
        raise InputError(f"step: the loss is {type(loss).__name__}: give a number or a tensor of one element")
    return float(loss)


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1 or loss.is_complex():
        raise InputError(f"step: the loss has shape {tuple(loss.shape)}: give one real number, such as loss.mean()")
    return loss.detach().reshape(())


def _check(model: Any, optimizer: Any, every: Any, on_finding: Any) -> None:
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

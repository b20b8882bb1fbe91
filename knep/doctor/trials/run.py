"""A short training run of a patient, on a copy, by the steps of its own recipe and with its schedule in small."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knep.doctor.model.signal_pass import forward
from knep.doctor.subject.batches import Batch
from knep.doctor.subject.setup import Patient
from knep.doctor.trials.scoring import Score, norms_of, score, settled
from knep.engine.step import Step
from knep.observe.update_stats import weights_of
from knep.optim.gradients import gradients
from knep.tasks.base import Reduction
from knep.tasks.classification import Classification
from knep.utils.rng import generator, mix

_USUAL = 0.1  # momentum of batch norm, PyTorch's
_LAG = 0.05  # of accuracy, between statistics of the batch and running ones


@dataclass
class Trial:
    """What a trial saw.

    losses, accs: of each step's batch in training mode; norms: of the gradient before clipping; shares: of it that
    clipping left, in [0, 1]; penalties: what the regularization added to the loss; updates: at a few steps, the median
    over weights of ||dw|| / ||w||; frozen_share: of half precision, the share of weight elements that a step with
    gradient left as they were; train: at the end, in eval mode, on training images; batch_stats: the same with the
    statistics of the batch, where the model has batch norm; lag: the accuracy that running statistics behind the
    weights cost, which some more batches gave back; curve: (step, validation Score); weight: ||w|| at the end over
    ||w|| at the start; diverged: a loss or a weight was not finite; model: the trained copy; rates: of the steps.
    """

    losses: list[float] = field(default_factory=list)
    accs: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    updates: list[tuple[int, float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    curve: list[tuple[int, Score]] = field(default_factory=list)
    frozen_share: float = 0.0
    weight: float = 1.0
    train: Score = field(default_factory=lambda: Score(math.nan, 0.0))
    batch_stats: Score | None = None
    lag: float = 0.0
    diverged: bool = False
    model: nn.Module | None = None

    @property
    def val(self) -> Score:
        """At the end."""
        return self.curve[-1][1] if self.curve else Score(math.inf, 0.0)

    @property
    def best(self) -> Score:
        """The validation Score of the best look."""
        return max((s for _, s in self.curve), key=lambda s: s.acc, default=Score(math.inf, 0.0))


def stopped(patient: Patient, trial: Trial) -> tuple[int, Score]:
    """Where early stopping would have ended the trial, if each look were an epoch: the step, and its best until then.

    Without early stopping the end of the trial and its last look.
    """
    if patient.stopping is None or not trial.curve:
        return len(trial.losses), trial.val
    sign = -1.0 if patient.monitor == "val/acc" else 1.0
    best, since = trial.curve[0][1], 0
    for step, seen in trial.curve[1:]:
        now, least = (sign * (s.acc if sign < 0 else s.loss) for s in (seen, best))
        since = 0 if now < least - patient.min_delta else since + 1
        best = seen if since == 0 else best
        if since >= patient.stopping:
            return step, best
    return len(trial.losses), best


def run(
    patient: Patient,
    steps: int,
    *,
    looks: int = 4,
    seed: int | None = None,
    watch: Callable[[int, nn.Module], None] | None = None,
) -> Trial:
    """Trains a copy of the patient's model for `steps` optimizer steps and looks at it `looks` times on the way.

    The schedule runs through all of its course in these steps. watch: called with (step, model) after each backward.
    """
    trial = Trial()
    device = patient.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(patient.seed if seed is None else seed)
        _train(patient, trial, steps, looks, watch)
    return trial


def _train(patient: Patient, trial: Trial, steps: int, looks: int, watch: Any) -> None:
    model = copy.deepcopy(patient.model).train()
    _follow_sooner(model, patient.total_steps / steps)
    trial.model = model
    optimizer: Any = patient.make_optimizer(model)
    per_epoch = max(1, round(steps / patient.epochs))
    scheduler = None
    if patient.make_scheduler is not None:
        scheduler = patient.make_scheduler(optimizer, total_steps=steps, steps_per_epoch=per_epoch)
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad}
    taken = Step(
        lambda x: forward(model, patient.scaling(x)),
        model,
        _Examined(patient),
        augment=patient.augment,
        clip=patient.clip,
        regularization=patient.regularization,
    )
    start = _norm(weights.values())
    looked = {max(1, round(steps * (i + 1) / looks)) for i in range(looks)}
    batches = order(patient)
    frozen: list[float] = []
    for step in range(steps):
        micro = [next(batches) for _ in range(patient.accumulate)]
        measured = step % max(1, steps // 8) == 0
        before = {name: w.detach().clone() for name, w in weights.items()} if measured else {}
        trial.rates.append(max(float(g["lr"]) for g in optimizer.param_groups))
        getattr(optimizer, "train", _nothing)()

        def closure(micro: Sequence[Batch] = micro, step: int = step) -> Tensor:
            return _pass(patient, taken, trial, micro, step, watch)

        optimizer.step(closure)
        taken.after(optimizer)
        if measured:
            stats = weights_of(weights, before, rows=False)
            trial.updates.append((step, sorted(s.update for s in stats)[len(stats) // 2] if stats else 0.0))
            frozen += [s.stuck for s in stats if s.stuck is not None]
        if scheduler is not None and (patient.interval == "step" or (step + 1) % per_epoch == 0):
            _advance(scheduler, trial)
        if not math.isfinite(trial.losses[-1]):
            trial.diverged = True
            break
        if step + 1 in looked:
            getattr(optimizer, "eval", _nothing)()
            trial.curve.append((step + 1, score(patient, model, patient.val)))
    getattr(optimizer, "eval", _nothing)()
    trial.diverged |= not all(bool(p.isfinite().all()) for p in model.parameters())
    trial.weight = _norm(weights.values()) / start if start else 1.0
    trial.frozen_share = sum(frozen) / len(frozen) if frozen else 0.0
    seen = patient.train[: max(1, 512 // max(1, len(patient.train[0][0])))]
    trial.train = score(patient, model, seen)
    if norms_of(model):
        trial.batch_stats = score(patient, model, seen, batch_stats=True)
        _settle(patient, trial, model, seen)


def _settle(patient: Patient, trial: Trial, model: nn.Module, seen: Sequence[Batch]) -> None:
    """Judges a trial that is the beginning of a longer run by running statistics that have come up with the weights.

    In the first steps of a deep network weights move faster than statistics of any usual momentum can follow, which
    more training ends by itself: what counts is whether they would follow weights that stand still.
    """
    gap = trial.batch_stats.acc - trial.train.acc if trial.batch_stats else 0.0
    if gap <= _LAG or trial.diverged or len(trial.losses) >= patient.total_steps:
        return
    still = settled(patient, model)
    train = score(patient, still, seen)
    if train.acc > trial.train.acc:
        trial.lag, trial.train, trial.model = train.acc - trial.train.acc, train, still
        if trial.curve:
            trial.curve[-1] = trial.curve[-1][0], score(patient, still, patient.val)


def _follow_sooner(model: nn.Module, stretch: float) -> None:
    """Running statistics take in as much of a trial as of the run, which has `stretch` times as many steps; slow ones
    are quickened up to the usual momentum, beyond which they would be noise."""
    for m in norms_of(model):
        if m.momentum is not None and 0 < m.momentum < _USUAL:
            m.momentum = min(_USUAL, 1 - (1 - m.momentum) ** max(1.0, stretch))


class _Examined(Classification):
    """The patient's task: its own loss, on its own device."""

    def __init__(self, patient: Patient) -> None:
        super().__init__(patient.num_classes)
        self._patient = patient

    def split(self, batch: Batch) -> Batch:
        x, y = batch
        return x.to(self._patient.device), y.to(self._patient.device)

    def check(self, output: Any, target: Any) -> None:
        """Whatever is wrong with them, the examination finds."""

    def loss(self, output: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
        return self._patient.criterion(output, target)


def _pass(patient: Patient, taken: Step, trial: Trial, micro: Sequence[Batch], step: int, watch: Any) -> Tensor:
    """Forward and backward over the micro-batches of a step, and the clipping; a second pass of a step logs nothing."""
    taken.clear()
    total, penalty = torch.zeros((), device=patient.device), 0.0
    correct = seen = 0
    for batch in micro:
        found = taken.backward(batch, 1 / len(micro), partial(cast, patient))
        penalty += float(torch.as_tensor(found.penalty).detach()) / len(micro)
        total += found.loss.detach() / len(micro)
        correct += int(found.counted.correct)
        seen += int(found.counted.rows)
    first = len(trial.losses) == step
    if watch is not None and first:
        watch(step, taken.model)
    learns = any(p.grad is not None for p in taken.parameters)
    before = float(taken.clip()[1]) if learns else 0.0
    if first:
        after = float(nn.utils.get_total_norm(gradients(taken.parameters))) if learns else 0.0
        trial.losses.append(float(total))
        trial.accs.append(correct / max(1, seen))
        trial.norms.append(before)
        trial.shares.append(after / before if before > 0 and math.isfinite(before) else 1.0)
        trial.penalties.append(penalty)
    return total


def _advance(scheduler: Any, trial: Trial) -> None:
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(trial.val.loss)
    else:
        scheduler.step()


def order(patient: Patient) -> Iterator[Batch]:
    """The patient's batches for as long as asked, every epoch in a new order where the run's loader shuffles."""
    yield from patient.train
    if not patient.shuffled:
        while True:
            yield from patient.train
    x = torch.cat([b[0] for b in patient.train])
    y = torch.cat([b[1] for b in patient.train])
    size, epoch = len(patient.train[0][0]), 0
    while True:
        epoch += 1
        if hasattr(patient.augment, "epoch"):
            patient.augment.epoch = epoch
        index = torch.randperm(len(x), generator=generator(mix(patient.seed, epoch) >> 1, 7))
        for i in range(max(1, len(x) // size)):
            part = index[i * size : (i + 1) * size]
            yield x[part], y[part]


@contextlib.contextmanager
def cast(patient: Patient) -> Iterator[None]:
    """Autocast where the run has mixed precision."""
    if "mixed" not in patient.precision:
        yield
        return
    dtype = torch.bfloat16 if patient.precision.startswith("bf16") else torch.float16
    with torch.autocast(patient.device.type, dtype=dtype):
        yield


def _norm(weights: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(w.detach().double().square().sum()) for w in weights))


def _nothing() -> None:
    pass

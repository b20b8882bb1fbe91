"""What the course of a trial and the settings of a patient make suspicious, each with the remedies that would tell."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from knep.doctor.findings import Finding, finding
from knep.doctor.subject.setup import Patient
from knep.doctor.trials import remedies
from knep.doctor.trials.dropout import capped, functional, settings
from knep.doctor.trials.remedies import Treatment, prescribed
from knep.doctor.trials.run import Trial
from knep.doctor.trials.scoring import norms_of
from knep.recipes import augment, clip
from knep.recipes.regularization import Regularizer

_MANY = 0.1  # share of the images from which on far larger values belong to the data


@dataclass(frozen=True)
class Suspect:
    """A suspicion and the ways of mending it."""

    finding: Finding
    ways: tuple[Treatment, ...] = ()


def _suspected(
    disease: str,
    evidence: str,
    gravity: float,
    ways: Sequence[Treatment] | None = None,
    *,
    certain: bool = False,
    **more: Any,
) -> Suspect:
    """With the ways that the table of diseases has, where none are more exact."""
    found = finding(disease, evidence, gravity, certain=certain, **more)
    return Suspect(found, prescribed(disease) if ways is None else tuple(ways))


def group_values(patient: Patient, key: str) -> list[float]:
    """The values of a key over the optimizer's parameter groups, for a list its first."""
    groups = patient.make_optimizer(copy.deepcopy(patient.model)).param_groups
    values = [g[key] for g in groups if g.get(key) is not None and not isinstance(g[key], bool)]
    return [float(v[0] if isinstance(v, (list, tuple)) else v) for v in values]


def suspects(patient: Patient, trial: Trial) -> list[Suspect]:
    """Everything about the training that is out of the ordinary; a trial of its remedy says whether it matters."""
    every = (
        _momentum,
        _weight_decay,
        _clip,
        _spikes,
        _dropout,
        _smoothing,
        _penalty,
        _augment,
        _precision,
        _statistics,
    )
    return [s for look in every for s in look(patient, trial)]


def _momentum(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    high = max([*group_values(patient, "momentum"), *group_values(patient, "betas")], default=0.0)
    if high > 0.955:
        lasting = 1 / max(1 - high, 1e-9)
        evidence = f"momentum {high:g}: a gradient acts on for about {lasting:.0f} steps of {len(trial.losses)}"
        line = "optimizer.momentum=0.9" if group_values(patient, "momentum") else "optimizer.betas=[0.9,0.999]"
        gravity = min(0.9, 0.5 + 4.5 * (high - 0.9))
        yield _suspected("momentum_instability", evidence, gravity, [((line,), remedies.momentum(0.9))])


def _weight_decay(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    decay = max(group_values(patient, "weight_decay"), default=0.0)
    shrink = sum(trial.rates) * decay
    if decay and (shrink > 0.7 or trial.weight < 0.6):
        evidence = (
            f"weight decay {decay:g} alone would shrink the weights to {math.exp(-min(shrink, 50)):.2g} of their "
            f"size in {len(trial.losses)} steps; they went to {trial.weight:.2g} of it"
        )
        gravity = 0.85 if trial.weight < 0.3 else 0.6
        lower = decay / 10 ** math.ceil(math.log10(max(10.0, shrink / 0.1)))
        way = (f"optimizer.weight_decay={lower:.2g}",), remedies.no_weight_decay
        yield _suspected("weight_decay_too_large", evidence, gravity, [way])


def _clip(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    shares = [s for s in trial.shares if s > 0]
    if getattr(patient.clip, "func", patient.clip) is clip.none or not shares:
        return
    share, cut = statistics.median(shares), sum(s < 0.99 for s in shares) / len(shares)
    if share < 0.3:
        evidence = (
            f"clipping cut {cut:.0%} of the steps and left {share:.2g} of a gradient whose usual norm is "
            f"{statistics.median(trial.norms):.2g}"
        )
        yield _suspected("clip_throttles", evidence, 0.85 if share < 0.03 else 0.6)


def _spikes(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    norms = [n for n in trial.norms if math.isfinite(n) and n > 0]
    if len(norms) < 20:
        return
    spikes = spiking_steps(trial)
    usual = statistics.median(norms)
    broken = broken_images(patient)
    if 0 < len(spikes) <= 0.1 * len(trial.norms) or broken:
        shown = ", ".join(map(str, spikes[:5]))
        evidence = f"{len(spikes)} of {len(trial.norms)} steps jump" + (f" (steps {shown})" if spikes else "")
        if spikes:
            top = max(trial.norms[s] for s in spikes)
            evidence += f": gradient norm up to {top:.3g} where {usual:.3g} is usual"
        if broken:
            evidence += f"; {broken}"
        lines = "clip=norm", f"clip.theta={usual:.2g}"
        tried = [without_outliers, remedies.clipped(usual)] if broken else [remedies.clipped(usual)]
        ways = [(lines, remedy) for remedy in tried]
        yield _suspected("loss_spikes", evidence, 0.9 if broken else 0.3, ways, mend="")


def spiking_steps(trial: Trial) -> list[int]:
    """Steps whose loss and gradient norm are far above those of the 20 steps around them."""
    spikes = []
    for i, (loss, norm) in enumerate(zip(trial.losses, trial.norms, strict=True)):
        near = [j for j in range(max(0, i - 10), min(len(trial.losses), i + 11)) if j != i]
        if len(near) < 8 or i < 3:
            continue
        losses, norms = [trial.losses[j] for j in near], [trial.norms[j] for j in near]
        usual, usual_norm = statistics.median(losses), statistics.median(norms)
        spread = statistics.median(abs(v - usual) for v in losses) + 0.05 * abs(usual) + 1e-3
        if not math.isfinite(loss) or (loss > usual + 8 * spread and norm > 4 * usual_norm and loss > 1.5 * usual):
            spikes.append(i)
    return spikes


def _sizes(patient: Patient) -> list[torch.Tensor]:
    return [_largest(patient, x) for x, _ in patient.train[:100]]


def _largest(patient: Patient, x: torch.Tensor) -> torch.Tensor:
    """max |x| of each image (N,); 0 where it is not finite, which is another disease."""
    largest = patient.inputs(x).float().flatten(1).abs().amax(1).cpu()
    return torch.where(largest.isfinite(), largest, 0.0)


def broken_images(patient: Patient) -> str:
    """A line on training batches with images of values far beyond those of the others, "" without."""
    sizes = _sizes(patient)
    usual = float(torch.cat(sizes).median())
    limit = 15 * max(usual, 1e-6)
    where = [i for i, s in enumerate(sizes) if bool((s > limit).any())]
    wild = float((torch.cat(sizes) > limit).float().mean())
    if not where or (len(where) > len(sizes) // 2 and wild > _MANY):
        return ""
    top = max(float(sizes[i].max()) for i in where)
    return (
        f"{len(where)} of {len(sizes)} batches hold images with values up to {top:.3g} where {usual:.3g} is usual "
        f"(batches {', '.join(map(str, where[:5]))})"
    )


def without_outliers(patient: Patient) -> Patient:
    """The training batches without the images of far too large values."""
    usual = float(torch.cat(_sizes(patient)).median())
    kept = []
    for x, y in patient.train:
        good = _largest(patient, x) <= 15 * max(usual, 1e-6)
        if bool(good.any()):
            kept.append((x[good], y[good]))
    return replace(patient, train=kept)


def _dropout(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    own, called = settings(patient.model), functional(patient)
    top = max([*own, *called], default=0.0)
    if top >= 0.4:
        evidence = (
            f"dropout of up to {top:g} in {len(own) + len(called)} places; accuracy on training images "
            f"{_mean(trial.accs[-20:]):.2f} with it, {trial.train.acc:.2f} without"
        )
        by_hand = max(called, default=0.0) >= 0.4  # no override reaches what a forward pass calls
        mend = "lower the p of the dropout functions in the model's forward to 0.1" if by_hand else ""
        ways = [(() if by_hand else _dropout_lines(patient), capped(0.1))]
        yield _suspected("too_much_dropout", evidence, 0.5 + 0.4 * top**2, ways, mend=mend)


def _dropout_lines(patient: Patient) -> tuple[str, ...]:
    return ("dropout.p=0.1",) if "p" in patient.option("dropout") else ("dropout=standard", "dropout.p=0.1")


def _smoothing(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    epsilon = patient.regularization.label_smoothing
    if isinstance(patient.loss, nn.CrossEntropyLoss):
        epsilon = patient.loss.label_smoothing
    if epsilon >= 0.3:
        evidence = f"{epsilon:.0%} of each label is spread over all {patient.num_classes} classes"
        way = remedies.by_lines("regularization=label_smoothing", "regularization.epsilon=0.1")
        yield _suspected("too_much_smoothing", evidence, 0.4 + 0.5 * epsilon, [way])


def _penalty(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    r = patient.regularization
    edits = type(r).after_step is not Regularizer.after_step
    # A penalty that wins is soon small, with the weights: its beginning counts.
    pairs = zip(trial.penalties[:20], trial.losses[:20], strict=True)
    share = statistics.median([p / max(loss, 1e-9) for p, loss in pairs if math.isfinite(loss)] or [0.0])
    if share > 0.2 or (edits and trial.weight < 0.7):
        evidence = f"the penalty is {share:.2g} times the loss; the weights went to {trial.weight:.2g} of their size"
        yield _suspected("too_much_penalty", evidence, 0.85 if share > 1 or trial.weight < 0.3 else 0.6)


def _augment(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    if isinstance(patient.augment, type(augment.none())):
        return
    evidence = (
        f"{type(patient.augment).__name__}: accuracy on training images {_mean(trial.accs[-20:]):.2f} with it, "
        f"{trial.train.acc:.2f} without"
    )
    yield _suspected("too_much_augment", evidence, 0.5)


def _precision(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in patient.model.parameters())
    if half or patient.precision.startswith("16"):
        evidence = (
            f"weights of {next(patient.model.parameters()).dtype}, precision {patient.precision}: "
            f"{trial.frozen_share:.0%} of the weights that had a gradient did not move in a step"
        )
        yield _suspected("precision_underflow", evidence, 0.8 if trial.frozen_share > 0.3 else 0.5)


def _statistics(patient: Patient, trial: Trial) -> Iterator[Suspect]:
    if trial.batch_stats is None:
        return
    gap = trial.batch_stats.acc - trial.train.acc
    size = len(patient.train[0][0])
    momenta = sorted({m.momentum for m in norms_of(patient.model) if m.momentum is not None})
    odd = any(m < 0.02 or m > 0.9 for m in momenta)
    if gap > 0.05 or size <= 4 or odd:
        evidence = (
            f"accuracy on training images {trial.batch_stats.acc:.2f} with the statistics of the batch, "
            f"{trial.train.acc:.2f} with the running ones; batches of {size}, momentum {_listed(momenta)}"
        )
        tiny = size <= 8 and (size <= 4 or gap > 0.05)
        name = "tiny_norm_batches" if tiny and not odd else "stale_statistics"
        lines = [("data.batch_size=64",)] if tiny else []
        lines += [("norm=batch", "norm.momentum=0.1")] if odd else []
        ways = [remedies.by_lines(*way) for way in (*lines, ("norm=group",))]
        yield _suspected(name, evidence, 0.85 if gap > 0.15 else 0.6, ways, certain=gap > 0.3, mend="")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values) or "none"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

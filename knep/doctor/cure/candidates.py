"""What is tried to cure a patient: the prescriptions of its report, and what is usual against such a disease.

A way is a group of override lines, as a person would type them. Trials choose among them, in `cure.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from knep.config.catalog import GROUPS
from knep.doctor.findings import Report
from knep.doctor.subject.setup import Patient
from knep.doctor.trials.remedies import inits

Way = tuple[str, ...]
OVERFITS = frozenset({"overfitting", "too_much_capacity"})

_FINDINGS = 4  # of a report whose ways are tried
_EACH = 3  # prescriptions of a finding
_UNSEEN = frozenset({"guard", "averaging", "callbacks"})  # groups that a trial does not run


def prescribed(report: Report) -> list[Way]:
    """What the report prescribes, the gravest finding first, each once; not what `usual` has in better doses."""
    found = [f for f in report.findings[:_FINDINGS] if f.disease not in OVERFITS]
    return _seen(way for f in found for way in f.overrides[:_EACH])


def usual(report: Report, patient: Patient) -> list[Way]:
    """What else is usual against the diseases of the report."""
    return _seen(way for f in report.findings[:_FINDINGS] for way in _USUAL.get(f.disease, _nothing)(patient))


def common(patient: Patient) -> list[Way]:
    """What is worth a trial whatever the trouble is."""
    return _seen([
        ("optimizer=adam", "optimizer.lr=0.001"),
        *_rates(patient, 0.1, 10.0),
        *(way for way, _ in inits(patient)),
        ("scheduler=cosine",),
        ("scaling=standardize",),
    ])  # fmt: skip


def _seen(ways: Iterable[Way]) -> list[Way]:
    """Each once, without those that a trial would not notice."""
    return [way for way in dict.fromkeys(ways) if not any(_group(line) in _UNSEEN for line in way)]


def finer(way: Way) -> list[Way]:
    """Values beside those of a way that helped: prescribed rates are powers of ten, and a run may want to be longer."""
    values = dict(line.split("=", 1) for line in way)
    rate, epochs = values.get("optimizer.lr"), values.get("trainer.max_epochs")
    rates = [(f"optimizer.lr={float(rate) * factor:.3g}",) for factor in (3.0, 0.3)] if rate else []
    return [*rates, *([(f"trainer.max_epochs={4 * int(epochs)}",)] if epochs else [])]


def merged(lines: Sequence[str], way: Sequence[str]) -> tuple[str, ...]:
    """Lines with those of a way, which replace what says otherwise."""
    keys = {key_of(line) for line in way}
    groups = {key for key in keys if key in GROUPS}

    def stays(line: str) -> bool:
        return key_of(line) not in keys and _group(line) not in groups

    return (*filter(stays, lines), *way)


def tidied(lines: Sequence[str]) -> tuple[str, ...]:
    """Lines without those that a later one replaces."""
    last = {key_of(line): i for i, line in enumerate(lines)}
    return tuple(line for i, line in enumerate(lines) if last[key_of(line)] == i)


def apart(way: Way, other: Way) -> bool:
    """Whether both can be followed: they speak of different groups."""
    return not {_group(line) for line in way} & {_group(line) for line in other}


def key_of(line: str) -> str:
    return line.partition("=")[0].lstrip("+")


def _group(line: str) -> str:
    return key_of(line).partition(".")[0]


def _nothing(patient: Patient) -> Iterator[Way]:
    return iter(())


def _rates(patient: Patient, *factors: float) -> Iterator[Way]:
    own = _node(patient, "optimizer").get("lr")
    if isinstance(own, (int, float)) and own > 0:
        yield from ((f"optimizer.lr={own * factor:.3g}",) for factor in factors)


def _generalise(patient: Patient) -> Iterator[Way]:
    """Against fitting the training images alone: more of them, an end in time, noise, and less freedom."""
    limit = _node(patient, "data").get("limit")
    if limit:
        yield (f"data.limit={10 * limit}",)
    yield ("stopping=early", "stopping.monitor=val/acc", "stopping.mode=max")
    pixels = f"augment.pixels={max(1, patient.train[0][0].shape[-1] // 14)}"
    yield ("augment=shift", pixels)
    yield ("augment=shift_flip", pixels)
    yield ("dropout=standard", "dropout.p=0.3")
    yield ("regularization=label_smoothing", "regularization.epsilon=0.1")
    # A decay that forgets over the length of the run.
    rate = _node(patient, "optimizer").get("lr") or 1e-3
    strength = min(max(1 / (rate * patient.total_steps), 0.01), 1.0)
    yield ("regularization=weight_decay", f"regularization.strength={strength:.2g}")
    yield from _scaled(patient, 0.5)


def _scaled(patient: Patient, factor: float) -> Iterator[Way]:
    """A net of other widths, where it is one of knep's."""
    model = _node(patient, "model")
    if isinstance(model.get("widths"), Sequence) and model["widths"]:
        yield (f"model.widths=[{','.join(str(math.ceil(w * factor)) for w in model['widths'])}]",)
    elif isinstance(model.get("width"), float):
        yield (f"model.width={model['width'] * factor:g}",)


def _wider(patient: Patient) -> Iterator[Way]:
    for factor in (4.0, 16.0):
        yield from _scaled(patient, factor)


def _steady(patient: Patient) -> Iterator[Way]:
    """Against a rate that is too high for what the steps see, at any time or at the end."""
    yield from _rates(patient, 0.1)
    yield ("scheduler=cosine",)
    yield ("clip=norm", "clip.theta=1.0")


def _signal(patient: Patient) -> Iterator[Way]:
    yield from (way for way, _ in inits(patient))


def _norms(patient: Patient) -> Iterator[Way]:
    yield ("norm=group",)
    yield ("norm=layer",)
    if len(patient.train[0][0]) < 32:
        yield ("data.batch_size=64",)


def _longer(patient: Patient) -> Iterator[Way]:
    yield (f"trainer.max_epochs={4 * patient.epochs}",)


def _node(patient: Patient, group: str) -> Mapping[str, Any]:
    return patient.option(group)


_USUAL: Mapping[str, Callable[[Patient], Iterator[Way]]] = {
    "overfitting": _generalise,
    "too_much_capacity": _generalise,
    "too_little_capacity": _wider,
    "lr_too_high": _steady,
    "momentum_instability": _steady,
    "no_decay": _steady,
    "loss_spikes": _steady,
    "vanishing_gradient": _signal,
    "exploding_gradient": _signal,
    "dying_relu": _signal,
    "saturation": _signal,
    "signal_collapse": _signal,
    "tiny_norm_batches": _norms,
    "stale_statistics": _norms,
    "stopping_too_early": _longer,
}

"""What is tried to cure a patient: the prescriptions of its report, and what is usual against such a disease.

A way is a group of override lines, as a person would type them. Trials choose among them, in `cure.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from knep.config.catalog import GROUPS
from knep.doctor.findings import Report
from knep.doctor.subject.setup import Patient
from knep.doctor.trials.examination import SIGNAL
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
    found, start = report.findings[:_FINDINGS], [way for way, _ in inits(patient)]
    return _filled((way for f in found for way in (start if f.disease in SIGNAL else f.about.usual)), patient)


def common(patient: Patient) -> list[Way]:
    """What is worth a trial whatever the trouble is."""
    ways = [
        ("optimizer=adam", "optimizer.lr=0.001"),
        ("optimizer.lr={lr_tenth}",),
        ("optimizer.lr={lr_tenfold}",),
        *(way for way, _ in inits(patient)),
        ("scheduler=cosine",),
        ("scaling=standardize",),
    ]
    return _filled(ways, patient)


def _filled(ways: Iterable[Way], patient: Patient) -> list[Way]:
    """With the patient's numbers, without ways for which it has none."""
    numbers, filled = _numbers(patient), []
    for way in ways:
        with contextlib.suppress(KeyError):
            filled.append(tuple(line.format_map(numbers) for line in way))
    return _seen(filled)


def _numbers(patient: Patient) -> dict[str, str]:
    """What the braces of a way stand for: those that this patient has."""
    x = patient.train[0][0]
    numbers = {"epochs_x4": f"{4 * patient.epochs}", "pixels": f"{max(1, x.shape[-1] // 14)}"}
    numbers |= {"larger_batch": "64"} if len(x) < 32 else {}
    rate, limit = patient.option("optimizer").get("lr"), patient.option("data").get("limit")
    if limit:
        numbers["limit_x10"] = f"{10 * limit}"
    if isinstance(rate, (int, float)) and rate > 0:
        numbers |= {"lr_tenth": f"{rate * 0.1:.3g}", "lr_tenfold": f"{rate * 10.0:.3g}"}
    # A decay that forgets over the length of the run.
    strength = min(max(1 / ((rate or 1e-3) * patient.total_steps), 0.01), 1.0)
    return numbers | _widths(patient.option("model")) | {"strength": f"{strength:.2g}"}


def _widths(model: Mapping[str, Any]) -> dict[str, str]:
    """The lines for nets of other widths, where it is one of knep's."""
    factors = {"width_half": 0.5, "width_x4": 4.0, "width_x16": 16.0}
    if isinstance(model.get("widths"), Sequence) and model["widths"]:
        wide = {name: ",".join(str(math.ceil(w * factor)) for w in model["widths"]) for name, factor in factors.items()}
        return {name: f"model.widths=[{widths}]" for name, widths in wide.items()}
    if isinstance(model.get("width"), float):
        return {name: f"model.width={model['width'] * factor:g}" for name, factor in factors.items()}
    return {}


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

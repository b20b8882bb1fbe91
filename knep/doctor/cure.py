"""The cure: the prescriptions of a report in short paired trials; what helps on the validation split is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knep.compose import Composed, compose_config
from knep.doctor.diagnose import diagnose
from knep.doctor.examination import looks
from knep.doctor.findings import Report
from knep.doctor.patient import Patient, from_config
from knep.doctor.trial import run, steps_of, stopped
from knep.errors import InputError
from knep.listing import GROUPS

_SEEDS = 2  # of each trial, the same for all candidates
_GAIN = 0.01  # validation accuracy that a prescription must bring
_ROUNDS = 3
_FINDINGS = 4  # of a report that are tried
_WAYS = 3  # of a finding


@dataclass(frozen=True)
class Cured:
    """The outcome of a cure.

    overrides: the whole cured line; kept: the groups of lines that helped, with the validation accuracy after each;
    before, after: validation accuracy of the trials, in [0, 1]; report: of the examination that it began with.
    """

    overrides: tuple[str, ...]
    kept: tuple[tuple[tuple[str, ...], float], ...]
    before: float
    after: float
    report: Report

    @property
    def command(self) -> str:
        return "python train.py " + " ".join(map(_quoted, self.overrides))

    def __str__(self) -> str:
        lines = [f"before: validation accuracy {self.before:.3f} ({_SEEDS} short trials)"]
        lines += [f"with {' '.join(way)}: {acc:.3f}" for way, acc in self.kept]
        if not self.kept:
            return "\n".join([*lines, "no prescription helped: what is left is for you to mend"])
        return "\n".join([*lines, f"after: {self.after:.3f}", f"train it with: {self.command}"])


def cure(
    overrides: Sequence[str],
    *,
    make: Callable[[Sequence[str]], Patient] | None = None,
    report: Report | None = None,
    told: Callable[[str], None] | None = None,
) -> Cured:
    """Tries what the report on these override lines prescribes, up to three rounds, and keeps what helps.

    make: from lines, the patient (default: as `knep doctor` makes it); report: of the first examination, if there is
    one already. Raises InputError for lines that cannot work.
    """
    make = make or patient_of
    tell = told or (lambda _: None)
    lines = tuple(overrides)
    first = report = report or diagnose(make(lines))
    before = best = measured(make(lines))
    kept: list[tuple[tuple[str, ...], float]] = []
    for _ in range(_ROUNDS):
        found = _best_way(lines, report, make, best, tell)
        if found is None:
            break
        way, lines, best = found
        kept.append((way, best))
        if best > 0.99:
            break
        report = diagnose(make(lines))
        if not report.sick:
            break
    return Cured(lines, tuple(kept), before, best, first)


def _best_way(
    lines: tuple[str, ...], report: Report, make: Any, best: float, tell: Callable[[str], None]
) -> tuple[tuple[str, ...], tuple[str, ...], float] | None:
    """The prescription that helps most, the line with it, and what it reaches; None where none helps."""
    chosen, top = None, best + _GAIN
    ways = [way for f in report.findings[:_FINDINGS] for way in f.overrides[:_WAYS]]
    for way in dict.fromkeys(ways):
        tell(" ".join(way))
        try:
            candidate = merged(lines, way)
            reached = measured(make(candidate))
        except InputError:  # this prescription does not fit this model
            continue
        if reached >= top:
            chosen, top = (way, candidate, reached), reached + 0.005
    return chosen


def measured(patient: Patient) -> float:
    """Validation accuracy where the patient's trial ends, early stopping included: over seeds, 0 if one diverged."""
    steps = steps_of(patient)
    trials = [run(patient, steps, looks=looks(patient, steps), seed=patient.seed + i) for i in range(_SEEDS)]
    scores = [stopped(patient, t)[1].acc if not t.diverged else 0.0 for t in trials]
    return sum(scores) / len(scores)


def patient_of(lines: Sequence[str]) -> Patient:
    """The patient that override lines describe."""
    made = compose_config(lines)
    return from_config(made.config, lines)


def merged(lines: Sequence[str], way: Sequence[str]) -> tuple[str, ...]:
    """Lines with those of a prescription, which replace what says otherwise."""
    keys = {line.partition("=")[0] for line in way}
    groups = {key for key in keys if key in GROUPS}

    def stays(line: str) -> bool:
        key = line.partition("=")[0].lstrip("+")
        return key not in keys and key.partition(".")[0] not in groups

    return (*filter(stays, lines), *way)


def recipe_yaml(made: Composed, note: str) -> str:
    """A recipe file that says what a composed config says in each slot: for `recipe=<its name>`.

    note: one line for its head.
    """
    import yaml

    from knep.listing import SLOTS

    head = ["# @package _global_", f"# {note}", "defaults:"]
    head += [f"  - override /{slot}: {made.choices[slot]}" for slot in SLOTS if slot in made.choices]
    values = {slot: _values(made.config[slot]) for slot in SLOTS if slot in made.choices}
    values = {slot: node for slot, node in values.items() if node}
    values |= {key: made.config[key] for key in ("layer_decay", "accumulate")}
    values["trainer"] = {"max_epochs": made.config["trainer"]["max_epochs"]}
    text = yaml.safe_dump(values, sort_keys=False)
    return "\n".join([*head, "  - _self_"]) + "\n" + text


def _values(node: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a slot's node, without what builds it."""
    return {k: v for k, v in node.items() if not k.startswith("_") and (not isinstance(v, float) or math.isfinite(v))}


def _quoted(line: str) -> str:
    return f"'{line}'" if any(c in line for c in "[]{}, ") else line

"""A case of the clinic: override lines, and what lines cannot say, for a patient and its healthy twin."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from knep.doctor.subject.setup import Patient

Mutation = Callable[[Patient], Patient]


@dataclass(frozen=True)
class Case:
    """One patient with a known disease, or a healthy one.

    disease: a name of diseases.yaml, "" for healthy; severity: in a word; base: lines of the healthy twin; sick: lines
    that are added; mutate: what lines cannot say; both: the same for patient and twin; half: A, on which thresholds may
    be set, or B, which is reported; curable: whether override lines can mend it; also: causes that are as right;
    mark: what suffers, "acc" or "loss" of validation, or "leak"; crashes: whether training raises an error.
    """

    name: str
    disease: str
    severity: str
    base: tuple[str, ...]
    sick: tuple[str, ...] = ()
    mutate: Mutation | None = None
    both: Mutation | None = None
    half: str = "A"
    curable: bool = False
    also: tuple[str, ...] = ()
    mark: str = "acc"
    crashes: bool = False

    @property
    def lines(self) -> tuple[str, ...]:
        """Override lines of the sick patient."""
        return (*self.base, *self.sick)

    @property
    def causes(self) -> tuple[str, ...]:
        """Every name that is right."""
        return (self.disease, *self.also) if self.disease else ()

    @property
    def key(self) -> str:
        """A hash of all that makes the patient and its twin: what was measured counts as long as it is the same."""
        what = (self.base, self.sick, described(self.both), described(self.mutate), self.mark)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Knob:
    """One way to fall ill, in words, lines and a mutation."""

    severity: str
    lines: tuple[str, ...] = ()
    mutate: Mutation | None = None


def described(mutation: Any) -> str:
    """The function's name with the values that it was given, so that the same mutation reads the same in each run."""
    if isinstance(mutation, partial):
        given = ", ".join(
            [*map(described, mutation.args), *(f"{k}={described(v)}" for k, v in mutation.keywords.items())]
        )
        return f"{described(mutation.func)}({given})"
    return getattr(mutation, "__name__", repr(mutation))


def turn(severity: str, mutation: Callable[..., Patient], **values: Any) -> Knob:
    """A knob that mutates the patient by `mutation(patient, **values)`."""
    return Knob(severity, mutate=partial(mutation, **values) if values else mutation)


def say(severity: str, *lines: str) -> Knob:
    """A knob of override lines."""
    return Knob(severity, lines)


def spread(
    disease: str, bases: Sequence[str], knobs: Sequence[Knob], *, both: Mutation | None = None, **facts: Any
) -> list[Case]:
    """A case for each knob on each base (names of `scripts.clinic.cases.bases`), the halves as on a chessboard.

    So each base and each knob is in both halves, and no two cases of different halves share both.
    """
    from scripts.clinic.cases.bases import BASES

    cases = []
    for i, base in enumerate(bases):
        for j, knob in enumerate(knobs):
            name = f"{disease}/{base}/{knob.severity}"
            half = "AB"[(i + j) % 2]
            cases.append(Case(name, disease, knob.severity, BASES[base], knob.lines, knob.mutate, both, half, **facts))
    return cases


def patient(case: Case) -> Patient:
    """The case's patient. Raises InputError as training does."""
    return remade(case, case.lines)


def remade(case: Case, lines: Sequence[str]) -> Patient:
    """The patient of other override lines, with all that lines cannot say."""
    made = _composed(lines)
    made = case.both(made) if case.both is not None else made
    return case.mutate(made) if case.mutate is not None else made


def twin(case: Case) -> Patient:
    """The healthy twin: the same without what makes it sick."""
    made = _composed(case.base)
    return case.both(made) if case.both is not None else made


def _composed(lines: Sequence[str]) -> Patient:
    from knep.config.compose import compose_config
    from knep.config.instantiate import allow
    from knep.doctor.subject.setup import from_config

    allow("scripts.clinic.cases.nets.")
    torch.set_num_threads(1)
    return from_config(compose_config(list(lines)).run, list(lines))

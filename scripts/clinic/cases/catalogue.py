"""All cases of the clinic by name."""

from __future__ import annotations

from collections import Counter
from functools import cache

from scripts.clinic.cases.case import Case
from scripts.clinic.cases.healthy import healthy_cases
from scripts.clinic.cases.sick_data import data_cases
from scripts.clinic.cases.sick_model import model_cases
from scripts.clinic.cases.sick_training import training_cases


@cache
def cases() -> dict[str, Case]:
    """Name -> case: the sick by disease, then the healthy."""
    everything = [*data_cases(), *model_cases(), *training_cases(), *healthy_cases()]
    twice = [name for name, count in Counter(case.name for case in everything).items() if count > 1]
    assert not twice, f"two cases are called {twice}"
    return {case.name: case for case in everything}

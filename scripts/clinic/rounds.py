"""The rounds through the clinic's cases: the check that they are sick, the examinations, the cures; all resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scripts.clinic import suffering
from scripts.clinic.cases.case import Case, patient, remade
from scripts.clinic.cases.catalogue import cases
from scripts.clinic.peers import PEERS
from scripts.clinic.workers import each

LIMIT = 120.0  # seconds that an answer may take
CURE_LIMIT = 900.0  # the same for a cure, which counts its own seconds of computing: the machine may be busy
Rows = dict[str, dict[str, Any]]


def checked(chosen: Sequence[Case], folder: Path, processes: int) -> list[Case]:
    """Those of the cases that are what they say; prints those that are not."""
    measured = _kept(folder / "measured.json", chosen, _measure, processes)
    counted = [case for case in chosen if measured[case.name].get("counts")]
    for case in chosen:
        row = measured[case.name]
        if "failure" in row:
            print(f"fails:  {case.name}: {row['failure']}")
        elif not row["counts"]:
            print(f"is not {'sick' if case.disease else 'healthy'}: {case.name}: {_against(row)}")
    print(f"{len(counted)} of {len(chosen)} cases count")
    return counted


def _against(row: dict[str, Any]) -> str:
    there = [f"{k} {row[k]:.3f}" for k in ("acc", "twin_acc", "held_acc", "loss", "twin_loss") if k in row]
    return ", ".join(there)


def examined(doctor: str, chosen: Sequence[Case], folder: Path, processes: int, afresh: bool = False) -> Rows:
    """Case -> {"findings": [[disease, gravity, evidence], ...], "seconds"} or {"failure"}."""
    name = "results.json" if doctor == "knep" else f"results-{doctor}.json"
    return _kept(folder / name, chosen, partial(examine, doctor), processes, afresh)


def cured(chosen: Sequence[Case], folder: Path, processes: int, afresh: bool = False) -> Rows:
    """Case -> {"acc", "twin_acc", "overrides", "seconds"} after the cure, of cases that overrides can mend."""
    return _kept(folder / "cures.json", chosen, cure, processes, afresh, CURE_LIMIT)


def _measure(name: str) -> dict[str, Any]:
    return suffering.measure(cases()[name])


def examine(doctor: str, name: str) -> dict[str, Any]:
    """One doctor's findings on one case, the gravest first."""
    made = patient(cases()[name])
    began = time.perf_counter()
    if doctor == "knep":
        from knep.doctor.diagnose import diagnose

        found = [[f.disease, round(f.gravity, 3), f.evidence] for f in diagnose(made).findings]
    else:
        found = [[disease, None, text] for disease, text in PEERS[doctor](made)]
    return {"findings": found, "seconds": round(time.perf_counter() - began, 2)}


def cure(name: str) -> dict[str, Any]:
    """Validation accuracy of the cured patient in the same trial as its twin's."""
    from knep.doctor.cure.search import cure as mend

    case = cases()[name]
    began = time.process_time()
    found = mend(case.lines, make=partial(remade, case))
    overrides = list(found.overrides)
    seconds = round(time.process_time() - began, 2)  # with the examination, on one core
    return suffering.trained_acc(case, overrides) | {"overrides": overrides, "seconds": seconds}


def _kept(
    path: Path,
    chosen: Sequence[Case],
    work: Callable[[str], dict[str, Any]],
    processes: int,
    afresh: bool = False,
    limit: float = LIMIT,
) -> Rows:
    """The rows of these cases: kept ones of the same key, and new ones, written after each."""
    known: Rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    keys = {case.name: case.key for case in chosen}
    todo = [name for name, key in keys.items() if afresh or known.get(name, {}).get("key") != key]
    for number, (name, row) in enumerate(each(work, todo, processes, limit), 1):
        known[name] = row | {"key": keys[name]}
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(known, indent=1), encoding="utf-8")
        part.replace(path)
        if number % 20 == 0:
            print(f"{path.stem}: {number} of {len(todo)}", flush=True)
    return {name: known[name] for name in keys}

"""`knep ledger`: every option of a slot against the slot's plain one, on each workload, kept for the cards.

One file per slot, knep/evidence/results/<slot>.json: {slot, command, cells}; a cell is one option on one workload.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knep.config.catalog import options
from knep.errors import InputError
from knep.evidence import effects
from knep.evidence.arguments import settings, take
from knep.evidence.arms import Arm
from knep.evidence.meta.verdicts import judged, spec
from knep.evidence.study import QUIET, classes_of, run
from knep.evidence.trials import Store, composed, plan
from knep.io.atomic import write_atomic
from knep.io.provenance import hardware
from knep.version import __version__

RESULTS = Path(__file__).parent / "results"


def ledger(words: Sequence[str]) -> int:
    """`knep ledger seeds=10 [slots=init,norm] [workloads=digits/mlp] [options=mine] [results=FOLDER]`.

    Runs what is missing and rewrites each slot's file when its options on a workload are complete; a smaller number of
    seeds is a good first pass, for its trials count in the larger one. out: where trials are kept. options: of one
    slot, measured beside its control, all other cells staying as they are. Every verdict is then given anew, with p
    corrected over all cells of all slots.
    Raises InputError for words that mean no runs. Returns 0: a trial that failed is a result.
    """
    given, about = settings("ledger", words, seeds=10), spec()
    folder = Path(take(given.overrides, "results", str(RESULTS)))
    workloads = _some("workloads", take(given.overrides, "workloads", ""), list(about["workloads"]))
    slots = _some("slots", ",".join(given.slots or ()), list(about["slots"]))
    few = take(given.overrides, "options", "")
    if few and len(slots) != 1:
        raise InputError(f"options={few} are of one slot: write slots= and its name beside them")
    few = _some("options", few, options(slots[0])) if few else None
    if given.overrides:
        raise InputError(
            f"{given.overrides[0]}: the ledger takes seeds, slots, workloads, options, processes, out and results"
        )
    store = Store(given.out or Path("outputs") / "ledger")
    for workload in workloads:
        for slot in (slot for slot in slots if slot in about["headline"].get(workload, slots)):
            cells = _cells(slot, workload, about, range(given.seeds), store, given.processes, few)
            _write(folder, slot, workload, cells, few)
            judge(folder, about)
    return 0


def _some(key: str, value: str, known: list[str]) -> list[str]:
    """The names of a comma-separated list, all where it is empty. Raises InputError for one that is unknown."""
    names = [name for name in value.strip("[]").split(",") if name]
    for name in names:
        if name not in known:
            raise InputError(f"{key}={name} is not in the ledger: write some of {','.join(known)}")
    return names or known


def arms(
    slot: str, workload: str, about: Mapping[str, Any], few: Sequence[str] | None = None
) -> tuple[list[Arm], dict[str, str]]:
    """An arm for each option that its workload can take, and option -> reason for the others; few: of these alone."""
    control, common = about["slots"][slot]["control"], about["slots"][slot]["common"]
    lines = (*about["base"], *about["workloads"][workload], *common)
    made, refused = [], {}
    for option in _taken(slot, workload, about):
        if few is not None and option not in (control, *few):
            continue
        arm = Arm(option, (*lines, f"{slot}={option}"), "" if option == control else control, slot, option)
        try:
            composed(arm, QUIET)
        except InputError as error:
            refused[option] = str(error)
        else:
            made.append(arm)
    return made, refused


def _taken(slot: str, workload: str, about: Mapping[str, Any]) -> list[str]:
    """The slot's options that a workload takes: all, or the headline's and the control."""
    known = options(slot)
    headline = about["headline"].get(workload)
    return known if headline is None else [o for o in known if o in (about["slots"][slot]["control"], *headline[slot])]


def _cells(
    slot: str,
    workload: str,
    about: Mapping[str, Any],
    seeds: Sequence[int],
    store: Store,
    processes: int,
    few: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    made, refused = arms(slot, workload, about, few)
    print(f"{slot} on {workload}: {len(made)} options, {len(seeds)} seeds")
    trials = plan(made, seeds, QUIET)
    records = run(trials, store, processes)
    sides = effects.by_arm(made, seeds, {(t.arm, t.seed): t.key for t in trials}, records)
    refused |= effects.refused(sides)
    measured = {name: by_seed for name, by_seed in sides.items() if name not in refused}
    classes = classes_of(records.values(), trials[0].made.config)
    metric = effects.of_classes(classes)
    target = effects.default_target(made, measured, metric)
    rows = {row.option: row for row in effects.table(made, measured, metric, target)}
    cells: list[dict[str, Any]] = []
    for arm in made:
        if arm.name in measured:
            row = asdict(rows[arm.option]) if arm.control else {}
            cells.append(_cell(arm, workload, measured[arm.name], classes, row) | {"target": target})
            if (
                few is not None and arm.control
            ):  # its control is not kept: an earlier one is, perhaps of another machine
                plain = _cell(arm, workload, measured[arm.control], classes, {})
                cells[-1]["own_control"] = {key: plain[key] for key in ("seeds", "test_acc", "right")}
    where = {"hardware": hardware(), "version": __version__}
    told = [{"option": option, "workload": workload, "refused": reason} for option, reason in refused.items()]
    return [cell | where for cell in cells] + told


def _cell(
    arm: Arm, workload: str, by_seed: Mapping[int, Mapping[str, Any]], classes: int, row: Mapping[str, Any]
) -> dict[str, Any]:
    """What was measured of one option on one workload; its effect where it is not the control."""
    kept = ("steps", "unreached", "control_unreached", "time", "memory", "failed")
    metric = effects.of_classes(classes)
    return {
        "option": arm.option,
        "workload": workload,
        "control": arm.control,
        "n": len(by_seed),
        "seeds": list(by_seed),
        "classes": classes,
        "test_acc": [round(effects.tested(r, metric), 6) for r in by_seed.values()],
        "test_images": effects.test_images(by_seed.values()),
        "right": [r.get("test/right") for r in by_seed.values()],
        "cpu_seconds": round(effects.median(by_seed, "cpu_seconds"), 2),
        "peak_mib": round(effects.median(by_seed, "peak_mib"), 1),
        "lines": list(arm.overrides),
        "commit": ", ".join(sorted({r["commit"] for r in by_seed.values() if r.get("commit")})),
        "reasons": sorted({r["reason"] for r in by_seed.values() if r.get("reason")}),
        "effect": {key: row[key] for key in kept} if row else None,
    }


def _write(folder: Path, slot: str, workload: str, cells: list[dict[str, Any]], few: Sequence[str] | None) -> None:
    """Puts the cells of one workload into the slot's file, in place of earlier ones; few: of these options alone."""
    kept = [c for c in _read(folder, slot) if c["workload"] != workload or (few is not None and c["option"] not in few)]
    _keep(folder, slot, kept + [cell for cell in cells if few is None or cell["option"] in few])


def judge(folder: Path, about: Mapping[str, Any]) -> None:
    """Gives every verdict of a folder of results anew: a cell more changes the correction of all others."""
    before = {slot: _read(folder, slot) for slot in about["slots"]}
    against = about["against"]
    for slot, cells in before.items():
        for cell in cells:
            if cell.get("effect"):
                cell["against"] = cell["workload"] in against.get(slot, {}).get(cell["option"], ())
    for slot, cells in judged(before).items():
        if cells:
            _keep(folder, slot, cells)


def _read(folder: Path, slot: str) -> list[dict[str, Any]]:
    path = folder / f"{slot}.json"
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []


def _keep(folder: Path, slot: str, cells: list[dict[str, Any]]) -> None:
    text = json.dumps({"slot": slot, "cells": _rounded(cells)}, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{slot}.json", text + "\n")


def _rounded(node: Any) -> Any:
    """Numbers to seven places, which is more than was measured, and null for those that are none."""
    if isinstance(node, dict):
        return {key: _rounded(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_rounded(value) for value in node]
    if isinstance(node, float):
        return round(node, 7) if node == node else None
    return node

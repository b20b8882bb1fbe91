"""What a search leaves: a recipe file with its evidence, the same as data, and a report."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knep.config.compose import Composed
from knep.doctor.cure.candidates import Way
from knep.doctor.cure.result import by_recipe, command, load, recipe_yaml
from knep.errors import InputError
from knep.evidence.auto.bench import Bench
from knep.evidence.auto.search import CHOOSING, Kept, Outcome
from knep.evidence.effects import failed, tested
from knep.evidence.stats import LEAST_PAIRS, Effect, paired
from knep.evidence.suggest.command import Problem
from knep.io.atomic import write_atomic
from knep.utils.text import shown

NAME = "found"
_SHOWN = 12  # ways of a list


def answer(found: Outcome) -> Way:
    """The lines that stand: the winner's where fresh seeds bear it out, else the plain ones."""
    return found.lines if found.proved else found.start


def write(folder: Path, found: Outcome, bench: Bench, problem: Problem) -> tuple[Path, Composed]:
    """Writes recipe/found.yaml and auto.json. Raises InputError where they cannot be written."""
    whole = bench.trial(answer(found), 0, math.inf, False).made
    made = Composed(whole.config, whole.choices, list(answer(found)))
    path = folder / "recipe" / f"{NAME}.yaml"
    note = "\n# ".join(evidence(found, bench))
    data = {
        "start": list(found.start),
        "lines": list(answer(found)),
        "proved": found.proved,
        "verdict": found.verdict,
        "metric": bench.metric.name,
        "effect": _plain(found.effect),
        "fresh_seeds": found.fresh,
        "test": _plain(test_effect(found, bench)),
        "test_means": test_means(found, bench),
        "kept": [
            {"lines": list(k.way), "chosen": _plain(k.chosen), "fresh": _plain(found.steps.get(k.way))}
            for k in found.kept
        ],
        "gains": {" ".join(way): gain if math.isfinite(gain) else None for way, gain in found.gains.items()},
        "refused": {" ".join(way): why for way, why in found.refused.items()},
        "untried": [" ".join(way) for way in found.untried],
        "bill": bench.purse.bill(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, recipe_yaml(made, note))
        write_atomic(folder / "auto.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(
            f"out={shown(str(folder))} cannot be written ({error.strerror}): choose another folder"
        ) from error
    return path, made


def _plain(effect: Effect | None) -> dict[str, Any] | None:
    return None if effect is None else asdict(effect)


def report(found: Outcome, bench: Bench, written: tuple[Path, Composed]) -> list[str]:
    """What is printed at the end."""
    path, made = written
    lines = ["", *evidence(found, bench), *_lists(found)]
    lines += [f"recipe: {path}", f"  {by_recipe(path, made)}", f"  {load(path)}"]
    return [*lines, f"or by its lines:\n  {command(answer(found))}"]


def evidence(found: Outcome, bench: Bench) -> list[str]:
    """The head of the recipe file: what stands, by what evidence, at what cost."""
    name = bench.metric.name
    lines = [_stands(found, name), f"Start: {' '.join(found.start)}"]
    if found.effect is not None:
        seeds = f"{len(found.fresh)} fresh seeds, {found.fresh[0]} to {found.fresh[-1]}"
        lines.append(f"Gain over it, validation {name}, {seeds}: {_span(found.effect, bench)}, {found.verdict}")
    lines += _test(found, bench)
    for kept in found.kept:
        own = found.steps.get(kept.way)
        fresh = f"; on fresh seeds {_span(own, bench)}" if own else "; on fresh seeds not by itself: no room for it"
        gone = "" if set(kept.way) <= set(found.lines) else "; a later line took its place"
        lines.append(f"{' '.join(kept.way)}: {_of_search(kept, bench)}{fresh}{gone}")
    if bench.length < 1:
        lines.append(f"Trials had {bench.length:.0%} of a run's length: what pays off later could not show")
    lines += [_blind(found, bench), f"Bill: {bench.purse.bill()}"]
    return [line for line in lines if line]


def _stands(found: Outcome, name: str) -> str:
    if found.proved:
        return f"Found by recipe=auto, and better than the plain line on seeds that chose nothing, by validation {name}"
    if found.stopped:
        return "recipe=auto was stopped before fresh seeds could judge: the plain line stays"
    if found.lines == found.start:
        return "recipe=auto found no trick that does better than noise: the plain line stays"
    if len(found.fresh) < LEAST_PAIRS:
        few = f"{len(found.fresh)} fresh seeds, and a verdict takes {LEAST_PAIRS}"
        return f"recipe=auto had room for {few}: the plain line stays"
    return "What recipe=auto chose is not better than the plain line on fresh seeds: the plain line stays"


def test_effect(found: Outcome, bench: Bench) -> Effect | None:
    """Winner minus plain line on the test split, above 0 where the winner is better; None where one of them failed."""
    sides = [
        [bench.records.get((" ".join(lines), str(seed))) for seed in found.fresh]
        for lines in (found.lines, found.start)
    ]
    if len(found.fresh) < 2 or any(record is None or failed(record) for side in sides for record in side):
        return None
    mine, plain = ([tested(record, bench.metric) for record in side if record is not None] for side in sides)
    sign = 1 if bench.metric.mode == "max" else -1
    return paired([sign * v for v in mine], [sign * v for v in plain])


def test_means(found: Outcome, bench: Bench) -> list[float | None]:
    """Of plain line and winner on the test split; None where no run has a number."""
    means = []
    for lines in (found.start, found.lines):
        records = [bench.records.get((" ".join(lines), str(seed)), {}) for seed in found.fresh]
        values = [float(v) for v in (record.get(f"test/{bench.metric.name}") for record in records) if v is not None]
        means.append(statistics.fmean(values) if values else None)
    return means


def _test(found: Outcome, bench: Bench) -> list[str]:
    effect = test_effect(found, bench)
    if effect is None:
        return []
    means = ["failed" if mean is None else bench.metric.text(mean) for mean in test_means(found, bench)]
    return [f"Test split, read once by each of these runs: {means[0]} before, {means[1]} after, {_span(effect, bench)}"]


def _span(effect: Effect, bench: Bench) -> str:
    mean, low, high = (bench.metric.text(v, signed=True) for v in (effect.mean, effect.low, effect.high))
    return f"{mean} [{low}, {high}]"


def _of_search(kept: Kept, bench: Bench) -> str:
    if not kept.judged:
        return "the best of the first runs, with no room for more seeds"
    gain = _span(kept.chosen, bench) if kept.chosen else "does not fail"
    return f"{gain} over the {len(CHOOSING)} seeds that chose it"


def _blind(found: Outcome, bench: Bench) -> str:
    if not math.isfinite(found.blind):
        return ""
    if found.blind == 0:
        return "No two runs differed on the validation split: it is too small, or too easy, to tell tricks apart"
    unit = " points" if bench.metric.mode == "max" else ""
    least = bench.metric.text(found.blind)
    return f"No further gain above {least}{unit} of validation {bench.metric.name} could be seen at this budget"


def _lists(found: Outcome) -> list[str]:
    lines = []
    left = [way for way in found.gains if way not in {k.way for k in found.kept}]
    if left:
        lines.append(f"tried and left: {_some(left)}")
    lines += [f"refused: {' '.join(way)}: {why}" for way, why in found.refused.items()]
    if found.untried:
        lines.append(f"not tried, for the budget: {_some(found.untried)}")
    return lines


def _some(ways: list[Way]) -> str:
    said = [" ".join(way) for way in ways]
    return ", ".join(said[:_SHOWN]) + (f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else "")

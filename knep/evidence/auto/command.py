"""`python train.py recipe=auto budget=10m LINES`: what is tried, from what line, and where the answer lies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from knep.config.catalog import SLOTS
from knep.doctor.cure.candidates import Way, key_of, tidied
from knep.errors import InputError
from knep.evidence.arguments import take
from knep.evidence.auto.bench import Bench, Over, Run, slower
from knep.evidence.auto.budget import Budget, Cost, Purse
from knep.evidence.auto.result import report, write
from knep.evidence.auto.search import LEAST_RUNS, Outcome, Search
from knep.evidence.effects import metric_of
from knep.evidence.rate.command import lines_of
from knep.evidence.rate.find import SHARE, find, rates
from knep.evidence.rate.short_run import Problem as RateProblem
from knep.evidence.suggest.command import Problem, ranked
from knep.evidence.suggest.command import against as advised_against
from knep.evidence.trials import Store, run_trials, warmed
from knep.utils.text import shown

WORD = "recipe=auto"
_WAYS = Path(__file__).with_name("ways.yaml")
_SEEDS = 2  # of the rate's range tests and trials
_OF_RATE = 0.25  # share of what the search may spend that goes into the rate at most
_DEAREST = 3.0  # times the plain line's time: a trick that takes more is compared with nothing of its cost
_OTHER_COST = {"averaging=ensemble"}  # several nets at use, too
_OTHERS = ("ckpt", "resume", "replay", "seed")


def auto(overrides: Sequence[str], clock: Callable[[], float] = time.monotonic, run: Run | None = None) -> Outcome:
    """Looks for a recipe, prints what it sees and leaves a recipe file, the evidence as JSON and the trials.

    run: trains a trial and gives its record, by default in a process of its own. Raises InputError for lines that mean
    no run, and for a budget that is none or too small.
    """
    given = [line for line in overrides if line != WORD]
    _refuse(given)
    text = take(given, "budget", "")
    if not text:
        raise InputError(
            f"{WORD} needs to know what it may spend: write budget=10m, budget=40runs or budget=20000steps"
        )
    purse = Purse(Budget.read(text), clock)
    folder = Path(take(given, "out", "") or time.strftime("outputs/%Y-%m-%d/%H-%M-%S_auto"))
    problem = _start(given)
    metric = metric_of(problem.made.config)
    rated = RateProblem.of(problem.made.config)
    store = Store(folder)
    train = run or (lambda trial: run_trials([trial], store)[trial.key])
    bench = Bench(purse, metric, train, problem.made, rated.total)
    trainer = problem.made.config["trainer"]
    bench.parts = trainer["max_steps"] if trainer["max_steps"] > 0 else trainer["max_epochs"]
    _tell(f"start: {' '.join(problem.lines)}")
    bench.length = _length(bench, rated, problem.lines)
    if run is None:
        warmed()
    search = Search(bench, problem.lines, _ways(problem, given), lambda: _rate(bench, rated, given), _tell)
    found = search.run()
    for line in report(found, bench, write(folder, found, bench, problem)):
        print(line, flush=True)
    if found.stopped:
        raise KeyboardInterrupt
    return found


def _tell(line: str) -> None:
    print(f"auto: {shown(line)}", flush=True)


def _refuse(lines: Sequence[str]) -> None:
    """Refuses what a search sets itself, or that is of one run alone."""
    for line in lines:
        key, _, value = line.partition("=")
        if key in _OTHERS:
            raise InputError(f"{line}: {WORD} starts runs of its own, with seeds 0, 1, ...: leave {key} out")
        if key == "recipe":
            raise InputError(f"{line}: {WORD} looks for the recipe: leave one of the two out")
        if key == "optimizer.lr" and value == "auto":
            raise InputError(f"{line}: {WORD} looks for the rate too: leave it out")


def _start(given: Sequence[str]) -> Problem:
    """The plain line: AdamW at its default, standardized images, and what was typed. Raises as training does."""
    typed = {key_of(line) for line in given}
    plain = [line for line in ("optimizer=adamw",) if key_of(line) not in typed]
    if "scaling" not in typed:
        try:
            return Problem.of(tidied(["recipe=none", *plain, "scaling=standardize", *given]))
        except InputError:  # of what are no images; what else is wrong the next line says
            pass
    return Problem.of(tidied(["recipe=none", *plain, *given]))


@lru_cache
def _pool() -> list[Way]:
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(OmegaConf.load(_WAYS))
    return [tuple(map(str, lines)) for lines in found]


def _ways(problem: Problem, given: Sequence[str]) -> list[Way]:
    """What is tried, by the effect that the ledger predicts here; what was typed stays as it was typed."""
    best = ranked(problem)
    predicted = {one.line: one.predicted.mean for one in best}
    known = {way[0] for way in _pool()}
    more = [(one.line,) for one in best if one.predicted.mean > 0 and one.line not in known | _OTHER_COST]
    there = {f"{slot}={problem.made.choices[slot]}" for slot in SLOTS}
    out = there | {f"{slot}={option}" for slot, option in advised_against(problem.made.choices["data"])}
    ways = [way for way in [*_pool(), *more] if way[0] not in out and not _typed(way, given)]
    return sorted((way for way in ways if slower(way) < _DEAREST), key=lambda way: -predicted.get(way[0], 0.0))


def _typed(way: Way, given: Sequence[str]) -> bool:
    """Whether a way would change what the user typed: a key, or a slot with keys of which some were."""
    typed = {key_of(line) for line in given}
    keys = {key_of(line) for line in way}
    return bool(keys & typed) or any(line.startswith(f"{key}.") for key in keys for line in typed)


def _length(bench: Bench, rated: RateProblem, lines: Way) -> float:
    """The share of a whole run that trials may have, 1 where the budget carries whole ones.

    Raises InputError where it does not even carry those of one epoch.
    """
    purse, unit = bench.purse, bench.purse.budget.unit
    if unit == "seconds":
        bench.pace = _pace(rated)
    one = bench.cost(lines).of(unit)
    runs = purse.left / one
    if runs >= LEAST_RUNS:
        return 1.0
    if LEAST_RUNS / bench.parts > runs:
        least = LEAST_RUNS * one / bench.parts
        raise InputError(
            f"budget={purse.budget.text} is too little: five pairs of the shortest runs and a search take about "
            f"{_as_budget(least, unit)} here, write at least that, or a smaller model"
        )
    share = math.floor(runs / LEAST_RUNS * bench.parts) / bench.parts
    _tell(
        f"a whole run costs {_as_budget(one, unit)}, so trials have {share:.0%} of its length: what pays off later "
        "cannot show"
    )
    return share


def _as_budget(amount: float, unit: str) -> str:
    if unit != "seconds":
        return f"{math.ceil(amount)}{unit}"
    return f"{math.ceil(amount)}s" if amount < 600 else f"{math.ceil(amount / 60)}m"


def _pace(rated: RateProblem) -> float:
    """Seconds of a step, from two short runs of different length: a first one wakes up what is slow once."""
    from lightning.pytorch import Callback

    took = []
    short, long = min(5, rated.total), min(45, rated.total)
    for steps in (1, short, long):
        began = time.perf_counter()
        rated.fit({}, steps, 0, Callback())
        took.append(time.perf_counter() - began)
    return max(0.0, took[2] - took[1]) / max(1, long - short) + _LAUNCH / rated.total


_LAUNCH = 0.5  # seconds of a trial's own process


def _rate(bench: Bench, rated: RateProblem, given: Sequence[str]) -> list[Way]:
    """The rate that its own short trials find, where there is room for them; else a third and thrice the default."""
    config = rated.config
    if any(key_of(line) == "optimizer.lr" for line in given) or not rates(config, 1.0):
        return []
    purse, unit = bench.purse, bench.purse.budget.unit
    steps = min(rated.total, max(100, rated.total // SHARE))

    def cost(count: int) -> Cost:
        all_steps = _SEEDS * (100 + count * steps)
        return Cost(all_steps, all_steps / bench.total, all_steps * bench.pace)

    room = _OF_RATE * (purse.left - bench.reserve)
    most = next((count for count in range(9, 2, -1) if cost(count + 2).of(unit) <= room), 0)
    if not most:
        _tell("the rate's own trials cost too much of this budget: three times the default and a third are tried")
        return [tuple(lines_of(config, factor)) for factor in (3.0, 1 / 3)]

    def told(line: str) -> None:
        _tell(f"lr: {line}")
        if purse.left < bench.reserve:
            raise Over

    try:
        found = find(rated, _SEEDS, told=told, most=most)
    except Over:
        return []
    except InputError as error:
        _tell(f"lr: {error}")
        return []
    purse.pay(cost(len(found.losses)), trials=_SEEDS * (1 + len(found.losses)))
    return [] if found.rate == found.default else [tuple(lines_of(config, found.rate / found.default))]

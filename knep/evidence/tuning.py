"""Search: each arm's nuisance parameters, tried on the validation split, every arm with the same number of points."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from knep.config.compose import Composed, compose_config
from knep.errors import InputError
from knep.evidence.arms import Arm
from knep.evidence.trials import Trial, composed

_SPACES = Path(__file__).with_name("spaces.yaml")
_EDGE = 0.05  # share of a range that counts as its edge
SAMPLERS = ("qmc", "tpe", "random")
SEEDS = (0, 1, 2)  # of each point: of one seed and a small validation split, the luckiest point would win


@dataclass(frozen=True)
class Range:
    """[low, high] of one parameter, searched on a logarithmic scale or not; whole: only whole numbers."""

    low: float
    high: float
    log: bool
    whole: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the low edge to 1 at the high one."""
        scale = math.log if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


@dataclass(frozen=True)
class Point:
    """A place in an arm's search space and the mean validation loss that it gave, infinite where a seed failed."""

    values: Mapping[str, float]
    value: float

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{key}={value}" for key, value in self.values.items())


def space(made: Composed) -> dict[str, Range]:
    """The ranges of the nuisance parameters that a config has. Raises InputError for a rule that has no family."""
    spec: Any = OmegaConf.to_container(OmegaConf.load(_SPACES))
    rule = made.choices["optimizer"]
    family = next((f for f in spec["families"].values() if rule in f["rules"]), None)
    if family is None:
        known = ", ".join(rule for f in spec["families"].values() for rule in f["rules"])
        raise InputError(f"optimizer={rule} has no search space in knep/evidence/spaces.yaml: write one of {known}")
    wanted = {key: Range(*map(float, ends), log=True) for key, ends in family.items() if key != "rules"}
    for key, (low, high) in spec["warmup"].items():
        steps = key.endswith("steps")
        wanted[key] = Range(low, high, log=steps, whole=steps)
    own_decay = made.choices.get("regularization") == "weight_decay"  # the rule's own must then stay 0
    return {
        key: ends
        for key, ends in wanted.items()
        if _has(made.config, key) and not (own_decay and key == "optimizer.weight_decay")
    }


def _has(config: Mapping[str, Any], key: str) -> bool:
    group, name = key.split(".")
    return config[group].get(name) is not None


def edges(point: Point, ranges: Mapping[str, Range]) -> list[str]:
    """What the best point says of its space: the parameters that lie at an end of their range."""
    said = []
    for key, value in point.values.items():
        share = ranges[key].share(value)
        if share < _EDGE or share > 1 - _EDGE:
            end = "low" if share < 0.5 else "high"
            said.append(f"{key}={value:.3g} lies at the {end} end of [{ranges[key].low:g}, {ranges[key].high:g}]")
    return said


def search(
    arms: Sequence[Arm], budget: int, sampler: str, run: Callable[[list[Trial]], Mapping[str, Mapping[str, Any]]]
) -> dict[str, list[Point]]:
    """`budget` points of each arm, all arms side by side, with the same three seeds; the same call asks for the same
    points again. What is looked for is the lowest mean validation loss, which knows more steps than an accuracy.

    run: runs trials and gives the record of each key.
    Raises InputError without Optuna, for an unknown sampler, or for an arm without a search space.
    """
    optuna = _optuna()
    spaces = {arm.name: space(composed(arm)) for arm in arms}
    studies = {arm.name: optuna.create_study(sampler=_sampler(optuna, sampler)) for arm in arms}
    found: dict[str, list[Point]] = {arm.name: [] for arm in arms}
    for _ in range(budget):
        asked = {a.name: studies[a.name].ask(_distributions(optuna, spaces[a.name])) for a in arms}
        trials = {a.name: [_trial(a, asked[a.name].params, seed) for seed in SEEDS] for a in arms}
        records = run([trial for some in trials.values() for trial in some])
        for arm in arms:
            value = statistics.fmean(_loss(records[trial.key]) for trial in trials[arm.name])
            studies[arm.name].tell(asked[arm.name], value)
            found[arm.name].append(Point(asked[arm.name].params, value))
    return found


def _trial(arm: Arm, values: Mapping[str, float], seed: int) -> Trial:
    lines = [*arm.overrides, *Point(values, 0).lines(), f"seed={seed}", "progress=false", "threads=1"]
    return Trial(arm.name, seed, compose_config(lines), tested=False)


def _loss(record: Mapping[str, Any]) -> float:
    return float(record["val/loss"]) if record["status"] in ("finished", "stopped_early") else math.inf


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError('compare searches with Optuna: pip install "knep[evidence]"') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _sampler(optuna: Any, name: str) -> Any:
    """Quasi-random points (Sobol 1967, scrambled), TPE (Bergstra et al. 2011) or independent ones, always the same."""
    if name not in SAMPLERS:
        raise InputError(f"sampler={name} is none: write one of {', '.join(SAMPLERS)}")
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    if name in kinds:
        return kinds[name](seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Optuna may change it is for its users to know, and tests would tell us
        return optuna.samplers.QMCSampler(
            qmc_type="sobol",
            scramble=True,
            seed=0,
            independent_sampler=optuna.samplers.RandomSampler(seed=0),
            warn_independent_sampling=False,
            warn_asynchronous_seeding=False,
        )


def _distributions(optuna: Any, ranges: Mapping[str, Range]) -> dict[str, Any]:
    d = optuna.distributions
    return {
        key: d.IntDistribution(int(r.low), int(r.high), log=r.log)
        if r.whole
        else d.FloatDistribution(r.low, r.high, log=r.log)
        for key, r in ranges.items()
    }

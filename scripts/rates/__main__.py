"""What `knep lr` finds beside the best of a grid of 12 rates, and what Lightning's and fastai's finders say.

python -m scripts.rates [--cases digits-mlp/sgd ...] [--share 5] [--out outputs/rates.json]

40 cases: eight networks with their data, each under five rules. The best of the grid is the rate of the least mean
validation loss over three seeds of the whole run. The three finders see the same range tests; fastai's and Lightning's
suggestions are the median over the seeds. Needs `pip install 'knep[bench]'` beside what `scripts.quality` asks for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knep.config.compose import compose_config
from knep.evidence.rate.find import find, rate_of, trial
from knep.evidence.rate.range_test import Curve
from knep.evidence.rate.short_run import Problem
from knep.utils.text import shown
from scripts.quality import sources

SEEDS = 3
RATIO = 10 ** (1 / 3)
_COMMON = ["recipe=none", "scheduler=cosine", "clip=norm", "threads=1", "progress=false"]
_ROWS = ["data=csv", "model=mlp", "model.widths=[64,64]", "data.batch_size=64"]
NETS: dict[str, tuple[Any, list[str]]] = {
    "digits-mlp": (None, ["data=digits", "model=mlp", "scaling=standardize", "trainer.max_epochs=15"]),
    "digits-cnn": (
        None,
        [
            "data=digits",
            "model=cnn",
            "model.widths=[8,16]",
            "norm=batch",
            "scaling=standardize",
            "trainer.max_epochs=12",
        ],
    ),
    "digits-resnet": (
        None,
        ["data=digits", "model=resnet", "model.width=0.25", "norm=batch", "scaling=unit", "trainer.max_epochs=8"],
    ),
    "diabetes-mlp": (sources.diabetes, [*_ROWS, "task=regression", "data.target=target", "trainer.max_epochs=40"]),
    "letter-mlp": (
        sources.letter,
        [*_ROWS, "data.target=lettr", "norm=layer", "data.batch_size=256", "trainer.max_epochs=4"],
    ),
    "yeast-mlp": (
        sources.yeast,
        [
            *_ROWS,
            "task=multilabel",
            f"data.target=[{','.join(f'Class{k}' for k in range(1, 15))}]",
            "trainer.max_epochs=8",
        ],
    ),
    "bytes-transformer": (
        sources.modules,
        [
            "data=text",
            "task=tokens",
            "model=transformer",
            "model.width=32",
            "model.depth=1",
            "data.batch_size=32",
            "trainer.max_epochs=1",
        ],
    ),
    "diamonds-mlp": (
        sources.diamonds,
        [*_ROWS, "task=regression", "data.target=price", "norm=layer", "data.batch_size=512", "trainer.max_epochs=2"],
    ),
}
RULES = ("sgd", "momentum", "adamw", "muon", "lion")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the file has not yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{net}/{rule}" for net in NETS for rule in RULES]
    parser.add_argument("--cases", nargs="*", default=every)
    parser.add_argument("--share", type=int, default=5, help="a trial of the finder is this part of a run")
    parser.add_argument("--out", type=Path, default=Path("outputs/rates.json"))
    asked = parser.parse_args(argv)
    kept = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() else {}
    for case in asked.cases:
        with tempfile.TemporaryDirectory() as folder:
            problem = _problem(case, Path(folder))
            row = kept.setdefault(case, {})
            if "grid" not in row:
                row["grid"] = grid(problem)
            key = f"found/{asked.share}"
            if key not in row:
                row |= {key: found(problem, asked.share)}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(line(case, row, asked.share), flush=True)
    for name, share in summary([kept[case] for case in asked.cases], asked.share).items():
        print(f"{name}: within a factor 2 of the grid's best in {share:.0%} of {len(asked.cases)}")
    return 0


def _problem(case: str, folder: Path) -> Problem:
    net, rule = case.split("/")
    source, lines = NETS[net]
    where = [] if source is None else [f"data.path={source(folder)}"]
    return Problem.of(compose_config([*_COMMON, *lines, *where, f"optimizer={rule}"]).config)


def grid(problem: Problem) -> list[list[Any]]:
    """[rate, validation loss of each seed] of 12 rates, seven below the default and four above, over the whole run."""
    default = rate_of(problem.config)
    rates = [default * RATIO**k for k in range(-6, 6)]
    return [[rate, *(_plain(trial(problem, rate, seed, problem.total)) for seed in range(SEEDS))] for rate in rates]


def found(problem: Problem, share: int) -> dict[str, Any]:
    """What the three finders say, and the processor seconds of knep's."""
    began = time.process_time()
    ours = find(problem, share=share)
    seconds = time.process_time() - began
    return {
        "knep": ours.suggestion,
        "agreed": ours.agreed,
        "default": ours.default,
        "trials": {f"{rate:.4g}": list(map(_plain, losses)) for rate, losses in ours.losses.items()},
        "seconds": seconds,
        "lightning": _median([lightning_says(curve) for curve in ours.curves]),
        "fastai": _median([fastai_says(curve) for curve in ours.curves]),
    }


def lightning_says(curve: Curve) -> float | None:
    """Lightning's suggestion: the steepest point, ten batches at the start and one at the end left out."""
    from lightning.pytorch.tuner.lr_finder import _LRFinder

    finder = _LRFinder("exponential", curve.rates[0], curve.rates[-1], len(curve.rates))
    finder.results = {"lr": list(curve.rates), "loss": curve.smooth}
    return finder.suggestion()


def fastai_says(curve: Curve) -> float | None:
    """fastai's default suggestion, `valley`."""
    from torch import tensor

    schedule: Any = importlib.import_module("fastai.callback.schedule")

    if len(curve.rates) < 10:
        return None
    return float(schedule.valley(tensor(curve.rates), tensor(curve.smooth), len(curve.rates))[0])


def _median(values: Sequence[float | None]) -> float | None:
    some = [value for value in values if value]
    return statistics.median(some) if some else None


def _plain(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def best_of(points: Sequence[Sequence[Any]]) -> float:
    """The rate of the grid whose mean loss is the least; a rate that diverged with one seed is none."""
    means = {rate: statistics.fmean(losses) for rate, *losses in points if None not in losses}
    return min(means, key=lambda rate: means[rate])


def within(rate: float | None, best: float, factor: float = 2.0) -> bool:
    return rate is not None and best / factor <= rate <= best * factor


def summary(rows: Sequence[dict[str, Any]], share: int) -> dict[str, float]:
    """Finder -> share of the cases in which it is within a factor 2 of the grid's best."""
    names = ("knep", "lightning", "fastai", "default")
    return {
        name: statistics.fmean(within(row[f"found/{share}"][name], best_of(row["grid"])) for row in rows)
        for name in names
    }


def line(case: str, row: dict[str, Any], share: int) -> str:
    said, best = row[f"found/{share}"], best_of(row["grid"])
    parts = [f"{name} {said[name]:.3g}" for name in ("default", "knep", "lightning", "fastai") if said[name]]
    ok = "within" if within(said["knep"], best) else "OFF"
    return f"{shown(case)}: grid {best:.3g}, {', '.join(parts)}, {ok} ({said['seconds']:.0f} s)"


if __name__ == "__main__":
    raise SystemExit(main())

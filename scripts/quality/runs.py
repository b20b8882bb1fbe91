"""What is run: knep's command for each data set, and who else is on the same rows."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from knep.config.compose import Composed, compose_config
from knep.config.instantiate import allow, instantiate
from knep.data.base import ImageData
from knep.engine.build import threads
from knep.run.run import run
from scripts.quality import rivals, sources

CONF = Path(__file__).parent / "conf"


@dataclass(frozen=True)
class Bar:
    """A data set, what knep is told to do with it, and who else tries.

    metric: of knep's summary; lower: whether less of it is better; source: makes the files; rivals: name to a function
    of the composed run and its prepared data, which gives the same metric.
    """

    metric: str
    lower: bool
    source: sources.Maker
    lines: Sequence[str]
    rivals: Mapping[str, Callable[[Composed, ImageData], float]]


@dataclass(frozen=True)
class Score:
    """Of one seed: the metric on its test split, and the seconds of processor time that it took."""

    value: float
    seconds: float


def composed(bar: Bar, path: Path, seed: int, extra: Sequence[str] = ()) -> Composed:
    """The run of one seed, which draws the split too."""
    where = [] if bar.source is sources.scenes else [f"data.path={path}"]
    own = [*bar.lines, *where, f"seed={seed}", f"data.split_seed={seed}", "threads=1", "progress=false", *extra]
    allow("scripts.quality.scenes.")
    return compose_config(own, [f"file://{CONF}"])


def by_knep(bar: Bar, made: Composed) -> Score:
    """knep's command in a folder of its own, as `knep train` runs it."""
    with tempfile.TemporaryDirectory() as folder, _silent(), threads(1):
        began = time.process_time()
        found = run(made.config, Path(folder), made.choices, made.overrides, figures=False)
        if found["status"] == "interrupted":  # which the run took for itself
            raise KeyboardInterrupt
        return Score(float(found[bar.metric]), time.process_time() - began)


def by_rival(bar: Bar, name: str, made: Composed) -> Score:
    """A rival on the rows that knep gets, in the same splits."""
    with _silent(), threads(1):
        data = instantiate(made.config["data"])
        data.prepare()
        began = time.process_time()
        value = bar.rivals[name](made, data)
        return Score(value, time.process_time() - began)


def _silent() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


_TABLE = ["data=csv", "model=mlp", "recipe=none", "averaging=ema", "scheduler=cosine", "optimizer=adamw"]
BARS = {
    "diamonds": Bar(
        "test/rmse",
        True,
        sources.diamonds,
        [
            *_TABLE,
            "task=regression",
            "data.target=price",
            "data.numbers=quantile",
            "norm=layer",
            "model.widths=[512,256,256]",
            "optimizer.lr=3e-3",
            "averaging.decay=0.998",
            "data.batch_size=256",
            "data.val_share=0.02",
            "trainer.max_epochs=25",
        ],
        {"MLPRegressor": rivals.mlp_regressor, "HistGradientBoostingRegressor": rivals.boosting},
    ),
    "diabetes": Bar(
        "test/rmse",
        True,
        sources.diabetes,
        [
            *_TABLE,
            "task=regression",
            "data.target=target",
            "model.widths=[64]",
            "optimizer.lr=3e-3",
            "averaging.decay=0.99",
            "data.batch_size=32",
            "data.val_share=0.2",
            "trainer.max_epochs=15",
        ],
        {"MLPRegressor": rivals.mlp_regressor, "HistGradientBoostingRegressor": rivals.boosting},
    ),
    "letter": Bar(
        "test/acc",
        False,
        sources.letter,
        [
            *_TABLE,
            "data.target=lettr",
            "model.widths=[256,256]",
            "optimizer.lr=3e-3",
            "data.batch_size=128",
            "trainer.max_epochs=20",
        ],
        {"MLPClassifier": rivals.mlp_classifier},
    ),
    "bytes": Bar(
        "test/perplexity",
        True,
        sources.modules,
        [
            "data=text",
            "task=tokens",
            "model=transformer",
            "model.width=64",
            "model.depth=2",
            "recipe=none",
            "optimizer=adamw",
            "scheduler=cosine",
            "optimizer.lr=2e-3",
            "data.batch_size=16",
            "trainer.max_epochs=8",
        ],
        {"a loop by hand": rivals.language_loop},
    ),
    "scenes": Bar(
        "test/iou",
        False,
        sources.scenes,
        [
            "data=scenes",
            "task=segmentation",
            "data.scenes=1000",
            "data.batch_size=16",
            "model=unet",
            "model.widths=[16,32,64]",
            "recipe=none",
            "scaling=unit",
            "norm=batch",
            "optimizer=adamw",
            "scheduler=cosine",
            "optimizer.lr=3e-3",
            "trainer.max_epochs=10",
        ],
        {"a loop by hand": rivals.segmentation_loop, "a forest of patches": rivals.patches_forest},
    ),
    "yeast": Bar(
        "test/f1",
        False,
        sources.yeast,
        [
            *_TABLE,
            "task=multilabel",
            "loss=asymmetric",
            "model.widths=[256]",
            "optimizer.lr=3e-3",
            "data.batch_size=64",
            "trainer.max_epochs=10",
            f"data.target=[{','.join(f'Class{k}' for k in range(1, 15))}]",
        ],
        {"MLPClassifier": rivals.mlp_labels},
    ),
}

"""What each strategy of fine-tuning is worth on few images, and the table of docs/finetune.md.

python -m scripts.finetune [--splits 10] [--sizes 100,500,2500] [--write]

A network of six convolutions learns the classes 0 to 4 of Fashion-MNIST and is tuned to the classes 5 to 9 with 100,
500 and 2,500 images. Each split draws its own training images; all strategies get the same images, seed and number of
steps.
The rate of each is the best of four on validation, mean over two further splits of 100 images; the test split, 5,000
images, is read once a run. Runs that are done already are kept in outputs/finetune.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from knep.config.compose import Composed, compose_config
from knep.config.instantiate import allow
from knep.errors import InputError
from knep.evidence.stats import paired
from knep.io.atomic import write_atomic
from knep.run.run import run

CONF = Path(__file__).parent / "conf"
OUT = Path("outputs/finetune.json")
PAGE = Path("docs/finetune.md")
MARKS = ("<!-- table -->", "<!-- end of table -->")

BASE = ("recipe=none", "data=half_fashion", "model=cnn", "model.widths=[8,16,32]", "model.convs=2", "norm=batch")
BASE += ("scaling=standardize", "optimizer=adamw", "scheduler=cosine", "trainer=cpu", "progress=false", "threads=1")
SOURCE = ("data.classes=low", "trainer.max_epochs=4")
ARMS = {
    "scratch": (),
    "full": ("finetune=full",),
    "head": ("finetune=head",),
    "gradual": ("finetune=gradual",),
    "layerwise": ("finetune=layerwise",),
}
LENGTH = {100: (20, 20), 500: (10, 50), 2500: (8, 50)}  # images -> epochs, batch size
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FURTHER = (100, 101)  # split seeds that rates are chosen on


class Runs:
    """Runs by the name of what they are, those kept that an earlier call did."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.found: dict[str, dict[str, float]] = json.loads(out.read_text()) if out.is_file() else {}
        self._source = out.parent / "finetune-source"

    def source(self) -> Path:
        """The folder of the run that the others start from, trained where it is missing."""
        if not (self._source / "checkpoints" / "final.ckpt").is_file():
            done = _run([*BASE, *SOURCE], self._source)
            print(f"source: test accuracy {done['test/acc']:.2%} on its own five classes", flush=True)
        return self._source

    def one(self, arm: str, images: int, split: int, lr: float) -> dict[str, float]:
        """Validation and test accuracy of one strategy."""
        name = f"{arm} images={images} split={split} lr={lr:g}"
        if name not in self.found:
            epochs, batch = LENGTH.get(images, (10, 50))
            lines = [*BASE, "data.classes=high", f"data.images={images}", f"data.batch_size={batch}", *ARMS[arm]]
            lines += [f"trainer.max_epochs={epochs}", f"trainer.check_val_every_n_epoch={epochs}"]
            lines += [] if arm == "scratch" else [f"model.weights={self.source()}"]
            with tempfile.TemporaryDirectory() as folder:
                done = _run(lines, Path(folder), split, lr)
            self.found[name] = {key: done[key] for key in ("val/acc", "test/acc")}
            self._out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._out, json.dumps(self.found, indent=1) + "\n")
            print(f"{name}: {done['test/acc']:.2%}", flush=True)
        return self.found[name]

    def rate(self, arm: str) -> float:
        """The best of `RATES` by validation on `FURTHER` splits of 100 images."""
        return max(RATES, key=lambda lr: sum(self.one(arm, 100, split, lr)["val/acc"] for split in FURTHER))


@lru_cache
def _composed(lines: tuple[str, ...]) -> Composed:
    allow("scripts.finetune.")
    return compose_config(list(lines), [f"file://{CONF.resolve()}"])


def _run(lines: Sequence[str], folder: Path, seed: int = 0, lr: float = 3e-3) -> dict[str, float]:
    """seed: of the split and of all else, which with the rate is what runs of the same lines differ in."""
    made = _composed(tuple(lines))
    config = copy.deepcopy(made.config)
    config["seed"] = config["data"]["seed"] = config["data"]["split_seed"] = seed
    config["optimizer"]["lr"] = lr
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        found = run(config, folder, made.choices, made.overrides, figures=False)
    if found["status"] == "interrupted":  # which the run took for itself
        raise KeyboardInterrupt
    return found


def table(runs: Runs, sizes: Sequence[int], splits: int) -> str:
    """Mean test accuracy of each strategy, and its paired difference to full, in points with 95 % intervals."""
    rows = ["| images | strategy | rate | n | test accuracy | against full, points |", "|---|---|---|---|---|---|"]
    rates = {arm: runs.rate(arm) for arm in ARMS}
    for images in sizes:
        scores = {
            arm: [runs.one(arm, images, split, rates[arm])["test/acc"] for split in range(splits)] for arm in ARMS
        }
        for arm, values in scores.items():
            difference = ""
            if arm != "full" and splits > 1:
                effect = paired(values, scores["full"])
                numbers = [100 * x for x in (effect.mean, effect.low, effect.high)]
                difference = f"{numbers[0]:+.2f} [{numbers[1]:+.2f}, {numbers[2]:+.2f}]"
            deviation = f" ± {100 * statistics.stdev(values):.2f}" if splits > 1 else ""
            mean = f"{100 * statistics.fmean(values):.2f} %{deviation}"
            rows.append(f"| {images:,} | {arm} | {rates[arm]:g} | {splits} | {mean} | {difference} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing and prints the table; with --write, puts it into docs/finetune.md too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--sizes", default="100,500,2500")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args(argv)
    try:
        found = table(Runs(OUT), [int(size) for size in asked.sizes.split(",")], asked.splits)
    except (InputError, ValueError) as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    print(found)
    if asked.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        write_atomic(PAGE, f"{before}{MARKS[0]}\n{found}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

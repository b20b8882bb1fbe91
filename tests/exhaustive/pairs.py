"""Every pair of options across two slots trains two steps on digits or is refused with a reason.

Prints one line per pair that failed and a count of all; exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from knep.config.catalog import SLOTS

_SLOTS = ("model", *SLOTS, "finetune")
# Two epochs of one batch: a step is taken, the schedule moves, averages form, and two epochs are compared.
SHORT = [
    "recipe=none",
    "data=digits",
    "data.batch_size=32",
    "data.limit=64",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=1",
    "progress=false",
    "threads=1",
    "seed=0",
]
# Small enough for thousands of runs; what is tested is how options meet, not capacity.
SMALL = {
    "model=cnn": ["model.widths=[8,16]"],
    "model=mlp": ["model.widths=[32,32]"],
    "model=resnet": ["model.depth=20", "model.width=0.5"],
    "model=inception": ["model.width=0.25"],
    "model=torchvision": ["model.name=shufflenet_v2_x0_5"],
    "model=timm": ["model.name=test_resnet"],
    "averaging=ensemble": ["averaging.members=2"],
    "finetune=gradual": ["finetune.stages=1"],
}

# Options that act on residual branches, which the small net of the others has not.
BRANCHES = {("init", name) for name in ("skipinit", "rezero", "layer_scale", "fixup")}
BRANCHES |= {("dropout", "stochastic_depth")}


# Choices of a slot beside its options: a stage of each kind in one list.
LISTS = {"augment": ["[repeats,random_resized_crop,flip,rand_augment,mixup_cutmix,erase]"]}


@cache
def lines(slot: str, option: str) -> tuple[str, ...]:
    return (f"{slot}={option}", *SMALL.get(f"{slot}={option}", []))


def all_pairs() -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Every ((slot, option), (slot, option)) across two different slots."""
    from knep.config.catalog import options

    for a, b in itertools.combinations(_SLOTS, 2):
        for x, y in itertools.product(options(a) + LISTS.get(a, []), options(b) + LISTS.get(b, [])):
            yield (a, x), (b, y)


def tried(what: str, name: str, chosen: list[str]) -> dict[str, str]:
    """{what: name, "outcome": trained | refused | failed, "reason"} of a run of these lines."""
    import contextlib
    import io

    from knep.config.compose import compose_config
    from knep.errors import InputError
    from knep.run.run import run

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            start = _started(chosen, Path(folder) / "start")
            composed = compose_config([*chosen, *start])
            summary = run(composed.config, Path(folder) / "run", composed.choices, composed.overrides)
        except InputError as error:
            return {what: name, "outcome": "refused", "reason": str(error)}
        except Exception as error:
            return {what: name, "outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
    if summary["steps"] < 1 or not math.isfinite(summary["val/loss"]):
        return {what: name, "outcome": "failed", "reason": f"no step was taken: {summary}"}
    return {what: name, "outcome": "trained", "reason": ""}


def _started(chosen: list[str], folder: Path) -> list[str]:
    """For a strategy of fine-tuning, the line with a first run of the other choices."""
    from knep.config.compose import compose_config
    from knep.run.run import run

    tuned = [line for line in chosen if line.startswith("finetune=") and line != "finetune=none"]
    if not tuned:
        return []
    others = [line for line in chosen if not line.startswith(("finetune", "init", "averaging", "optimizer"))]
    first = compose_config([*others, "optimizer=adamw", "optimizer.lr=1e-4"])
    folder.mkdir()
    run(first.config, folder, first.choices, first.overrides)
    return [f"model.weights={folder}"]


def try_pair(pair: tuple[tuple[str, str], tuple[str, str]]) -> dict[str, str]:
    """{"pair", "outcome": trained | refused | failed, "reason"} of one pair."""
    (a, x), (b, y) = pair
    branches = {("init", name) for name in ("skipinit", "rezero", "layer_scale", "fixup")} | {
        ("dropout", "stochastic_depth")
    }
    network = () if "model" in (a, b) else lines("model", "resnet" if branches & {*pair} else "cnn")
    return tried("pair", f"{a}={x} {b}={y}", [*SHORT, *lines(a, x), *lines(b, y), *network])


def try_all(pairs: Iterable[tuple[tuple[str, str], tuple[str, str]]], processes: int) -> Iterator[dict[str, str]]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=quiet) as pool:
        yield from pool.imap_unordered(try_pair, pairs, chunksize=8)


def quiet() -> None:
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="try only every n-th pair")
    parser.add_argument("--out", type=Path, default=Path("outputs/pairs.json"))
    args = parser.parse_args()
    pairs = list(all_pairs())[:: args.every]
    rows = []
    for row in try_all(pairs, args.processes):
        rows.append(row)
        if row["outcome"] == "failed":
            print(f"failed  {row['pair']}: {row['reason'][:300]}", flush=True)
        if len(rows) % 500 == 0:
            print(f"{len(rows)} of {len(pairs)}", flush=True)
    counts = Counter(row["outcome"] for row in rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1))
    reasons = Counter(row["reason"] for row in rows if row["outcome"] == "refused")
    for reason, n in reasons.most_common():
        print(f"refused {n:4}: {reason}")
    print(f"{len(rows)} pairs: {counts['trained']} trained, {counts['refused']} refused, {counts['failed']} failed")
    raise SystemExit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()

"""Every option of every slot under every task trains two steps on made-up rows or is refused with a reason.

Prints one line per cell that failed and a count by task; exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from knep.config.catalog import SLOTS
from knep.utils.monitors import OF_TASK
from tests.exhaustive.pairs import LISTS, SMALL, lines, quiet, tried

_SLOTS = ("model", "loss", "sampling", *SLOTS, "finetune")
SHORT = [
    "recipe=none",
    "data=synthetic",
    "data.images=64",
    "data.image_size=8",
    "data.classes=4",
    "data.batch_size=32",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=1",
    "progress=false",
    "threads=1",
    "seed=0",
]
# A network whose output each task reads.
NETWORK = {
    "segmentation": ["model=unet", "model.widths=[4,8]"],
    "tokens": ["model=transformer", "model.width=16", "model.depth=1", "model.heads=2"],
    "tagging": ["model=transformer", "model.width=16", "model.depth=1", "model.heads=2", "model.causal=false"],
}
Cell = tuple[str, str, str]


def all_cells() -> Iterator[Cell]:
    """Every (task, slot, option)."""
    from knep.config.catalog import options

    for task in OF_TASK:
        for slot in _SLOTS:
            for option in options(slot) + LISTS.get(slot, []):
                yield task, slot, option


def try_cell(cell: Cell) -> dict[str, str]:
    """{"cell", "outcome": trained | refused | failed, "reason"} of one cell."""
    task, slot, option = cell
    network = [] if slot == "model" else NETWORK.get(task, ["model=mlp", *SMALL["model=mlp"]])
    if slot != "scaling" and task not in ("tokens", "tagging"):
        network = ["scaling=unit", *network]  # pixels in 0..255 diverge under some rates
    return tried("cell", f"task={task} {slot}={option}", [*SHORT, f"task={task}", *network, *lines(slot, option)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="try only every n-th cell")
    parser.add_argument("--out", type=Path, default=Path("outputs/task_pairs.json"))
    args = parser.parse_args()
    cells = list(all_cells())[:: args.every]
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.processes, initializer=quiet) as pool:
        for row in pool.imap_unordered(try_cell, cells, chunksize=4):
            rows.append(row)
            if row["outcome"] == "failed":
                print(f"failed  {row['cell']}: {row['reason'][:300]}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1))
    for reason, n in Counter(row["reason"] for row in rows if row["outcome"] == "refused").most_common():
        print(f"refused {n:4}: {reason}")
    for task in OF_TASK:
        counts = Counter(row["outcome"] for row in rows if row["cell"].startswith(f"task={task} "))
        print(f"{task:13} {counts['trained']} trained, {counts['refused']} refused, {counts['failed']} failed")
    raise SystemExit(1 if any(row["outcome"] == "failed" for row in rows) else 0)


if __name__ == "__main__":
    main()

"""The bench: knep beside a hand-written loop and the usual Lightning set-up, in turn, on the same data and threads.

python -m scripts.bench [steps|startup|accuracy|memory|peers|race|guard|saving|doctor|members]; `report` writes the page
(docs/performance.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from knep.engine.build import threads
from knep.evidence.stats import paired
from knep.io.provenance import processor
from knep.run.run import run
from scripts.bench import bars, measure, overhead, processes
from scripts.bench.cases import CASES, composed, source
from scripts.bench.contenders import contenders, prepared, usual_accuracy
from scripts.bench.members import members
from scripts.bench.race import race
from scripts.bench.watch import screen

OUT = Path("outputs/bench")


def main() -> None:
    """One kind of measurement: printed, held against its bars, and written to outputs/bench/<kind>.json."""
    args = _arguments()
    if args.kind == "report":
        page = Path("docs/performance.md")
        earlier = page.read_text(encoding="utf-8") if page.is_file() else ""
        page.write_text(bars.page(OUT, earlier), encoding="utf-8")
        return
    with threads(args.threads):
        if args.kind == "peak":
            case = CASES[args.models[0]]
            data = prepared(case)
            start = processes.own_peak()
            contenders(peers=False)[args.contender](case, data)
            print(start, processes.own_peak())
            return
        found = _measured(args)
        where = _where()
    OUT.mkdir(parents=True, exist_ok=True)
    command = f"python -m scripts.bench {' '.join(sys.argv[1:])}"
    stored = {"kind": args.kind, "command": command, "where": where, "found": found}
    (OUT / f"{args.kind}.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    if args.kind != "peers":
        print(bars.table(args.kind, found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = [
        "steps",
        "startup",
        "accuracy",
        "memory",
        "peers",
        "race",
        "guard",
        "saving",
        "doctor",
        "members",
        "report",
        "peak",
    ]
    parser.add_argument("kind", nargs="?", default="steps", choices=kinds, metavar="|".join(kinds[:-1]))
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender, or paired seeds")
    parser.add_argument("--steps", type=int, help="measured steps of a run; default: by the model")
    parser.add_argument("--epochs", type=int, default=3, help="of the runs that accuracy compares")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--contender", default="knep", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    if args.kind in ("steps", "peers"):
        return measure.steps(args.models, args.repeats, args.steps, peers=args.kind == "peers")
    if args.kind == "startup":
        return processes.startup(args.repeats, source())
    if args.kind == "race":
        return race()
    if args.kind == "members":
        return members(args.models, args.repeats)
    if args.kind in overhead.OPTIONS:
        return overhead.overhead(args.kind, args.models, args.repeats, args.steps)
    if args.kind == "memory":
        return processes.memory(args.models, args.repeats)
    return {name: _accuracy(name, args.repeats, args.epochs) for name in args.models}


def _accuracy(name: str, seeds: int, epochs: int) -> dict[str, Any]:
    """Test accuracy of knep and of the usual set-up from the same seeds, in per cent, and the paired difference.

    Both anneal the rate by a cosine: at a constant rate the last step decides more than the two set-ups differ.
    """
    case, pairs = CASES[name], []
    data = prepared(case)
    for seed in range(seeds):
        extra = [f"trainer.max_epochs={epochs}", f"seed={seed}", "scheduler=cosine", "scheduler.warmup=0.0"]
        made = composed(case, extra)
        with tempfile.TemporaryDirectory() as folder, screen():
            ours = run(made.config, Path(folder), made.choices, made.overrides)["test/acc"]
        pairs.append((100 * ours, 100 * usual_accuracy(case, data, seed, epochs)))
        print(name, seed, *(f"{p:.2f}" for p in pairs[-1]), flush=True)
    found = paired([ours for ours, _ in pairs], [usual for _, usual in pairs])
    return {"pairs": pairs, "epochs": epochs, "difference": found.mean, "low": found.low, "high": found.high}


def _where() -> dict[str, Any]:
    import lightning

    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


if __name__ == "__main__":
    main()

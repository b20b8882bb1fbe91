"""Accuracy of a command over several seeds: `python scripts/seeds.py --seeds 5 recipe=digits_best`.

Prints mean and deviation of the test accuracy, the validation accuracy that chose, and the seconds; `--out` keeps them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def one(overrides: list[str], seed: int) -> dict[str, float]:
    """The summary of one run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "knep.train", *overrides, f"seed={seed}", "progress=false"]
        subprocess.run([*command, f"hydra.run.dir={folder}/run"], check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(folder, "run", "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    runs: list[dict[str, float]] = []
    text = ""
    for seed in range(args.seeds):
        runs.append(one(args.overrides, seed))
        last = runs[-1]
        print(f"seed {seed}: test {last['test/acc']:.2%}, {last['seconds']:.0f} s", flush=True)
        text = json.dumps(result(args.overrides, runs), indent=2)
        if args.out:  # after each seed, so that an interruption leaves what was measured, with its n
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text + "\n")
    print(text)


def result(overrides: list[str], runs: list[dict[str, float]]) -> dict[str, object]:
    """Mean and deviation over the runs so far, with the command and how many they are."""
    tests = [run["test/acc"] for run in runs]
    return {
        "command": " ".join(["python train.py", *overrides]),
        "n": len(runs),
        "test_acc_mean": statistics.fmean(tests),
        "test_acc_std": statistics.stdev(tests) if len(tests) > 1 else None,
        "test_acc": tests,
        "val_acc_mean": statistics.fmean(run["val/acc"] for run in runs),
        "seconds_mean": statistics.fmean(run["seconds"] for run in runs),
        "parameters": runs[0]["parameters"],
    }


if __name__ == "__main__":
    main()

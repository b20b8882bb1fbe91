"""How often the intervals of `knep.evidence.stats` hold a known effect: `python scripts/intervals.py --rounds 1000`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from knep.evidence.stats import paired


@dataclass(frozen=True)
class Coverage:
    """Shares of the rounds in which each 95 % interval held the truth."""

    t: float
    bootstrap: float


def coverage(n: int, rounds: int, effect: float = 0.004, seed: int = 0) -> Coverage:
    """Pairs of accuracies around 0.97 that share what a seed does (deviation 0.01) and differ by `effect` and noise."""
    rng, held, held_boot = np.random.default_rng(seed), 0, 0
    for _ in range(rounds):
        shared = rng.normal(0.97, 0.01, n)
        treated, control = shared + effect + rng.normal(0, 0.005, n), shared + rng.normal(0, 0.005, n)
        found = paired(treated.tolist(), control.tolist())
        held += found.low <= effect <= found.high
        held_boot += found.boot_low <= effect <= found.boot_high
    return Coverage(held / rounds, held_boot / rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    for n in (3, 5, 10, 20):
        found = coverage(n, rounds)
        print(f"{n} pairs: Student's t {found.t:.1%}, BCa bootstrap {found.bootstrap:.1%} of {rounds} rounds")


if __name__ == "__main__":
    main()

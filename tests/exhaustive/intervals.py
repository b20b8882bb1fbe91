"""How often the intervals of `knep.evidence.stats` hold a known effect.

`python -m tests.exhaustive.intervals --rounds 1000` prints the shares; exit code 1 where Student's t, by which verdicts
go, holds the effect less often or more often than 95 % of the rounds by more than chance does.
"""

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
    chance = 4 * (0.95 * 0.05 / rounds) ** 0.5  # four standard deviations of the share
    wrong = 0
    for n in (3, 5, 10, 20):
        found = coverage(n, rounds)
        wrong += abs(found.t - 0.95) > chance
        print(f"{n} pairs: Student's t {found.t:.1%}, BCa bootstrap {found.bootstrap:.1%} of {rounds} rounds")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()

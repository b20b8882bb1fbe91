"""Randomness as a function of (seed, purpose, position): nothing to store, so a resumed run draws the same numbers."""

import torch

_MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """One 64-bit number from a few integers, by the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def generator(*words: int) -> torch.Generator:
    """A CPU generator seeded by `mix(*words)`."""
    return torch.Generator().manual_seed(mix(*words) >> 1)

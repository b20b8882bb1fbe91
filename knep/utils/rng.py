"""Randomness as a function of (seed, purpose, position): nothing to store, so a resumed run draws the same numbers."""

from collections.abc import Mapping

import torch
from torch import Tensor

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


def reseed(seed: int, device: torch.device) -> None:
    """Seeds the generators that a step on `device` draws from: the CPU's and its own.

    `torch.manual_seed` asks every backend there could be, which takes longer than the step of a small network.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a step on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)

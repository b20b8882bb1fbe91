"""One state of the random generator per member, so that a member draws what it would draw alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from knep.utils.rng import reseed


class Draws:
    """The states of `count` members on one device; between its own turns a member's state rests here.

    On a GPU a step draws from that device's generator, on a CPU from the default one.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.device = device
        self._states: list[Tensor] = [self._generator.get_state()] * count

    @property
    def _generator(self) -> torch.Generator:
        if self.device.type == "cpu":
            return torch.default_generator
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        return torch.cuda.default_generators[index]

    def seed(self, member: int, seed: int) -> None:
        """Starts a member's draws of a step anew."""
        reseed(seed, self.device)
        self._states[member] = self._generator.get_state()

    @contextmanager
    def of(self, member: int) -> Iterator[None]:
        """What is drawn inside goes on where this member stopped drawing."""
        self._generator.set_state(self._states[member])
        yield
        self._states[member] = self._generator.get_state()

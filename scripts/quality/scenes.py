"""scikit-learn's handwritten digits drawn into scenes, with a mask that says which digit each pixel belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knep.data.base import Arrays, InMemory
from knep.errors import InputError
from knep.utils.rng import generator

_BACKGROUND = 10
_INK = 4  # of 16: paler pixels of a digit are background


class Scenes(InMemory):
    """uint8 (N, 1, side, side) and masks int64 (N, side, side): 0 to 9 for digits, 10 for the background.

    Digits lie at random places over noise, later ones over earlier ones. Each split draws from digits of its own, so
    that no handwriting of the test was seen in training.

    scenes: in all; side: pixels, at least 8; digits: in a scene.
    """

    def __init__(self, *, scenes: int = 1000, side: int = 32, digits: int = 4, **common: Any) -> None:
        super().__init__(**common)
        for name, value, least in (("scenes", scenes, 10), ("side", side, 8), ("digits", digits, 1)):
            if not isinstance(value, int) or value < least:
                raise InputError(f"data.{name}={value} must be a whole number, at least {least}")
        self._scenes, self._side, self._digits = scenes, side, digits

    def _arrays(self) -> Arrays:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        ink, names = torch.from_numpy(x).reshape(-1, 8, 8), torch.from_numpy(y)
        rng = generator(self.split_seed, 7)
        order = torch.randperm(len(ink), generator=rng)
        test = self._scenes // 5
        val = max(1, round((self._scenes - test) * self.val_share))
        parts, at = [], 0
        for count in (test, val, self._scenes - test - val):
            share = len(order) * count // self._scenes
            chosen = order[at : at + share]
            at += share
            parts.append(self._drawn(ink[chosen], names[chosen], count, rng))
        (test_x, test_y), (val_x, val_y), (train_x, train_y) = parts
        classes = [*map(str, range(_BACKGROUND)), "background"]
        return Arrays(train_x, train_y, test_x, test_y, classes, val_x=val_x, val_y=val_y)

    def _drawn(self, ink: Tensor, names: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        side = self._side
        x = torch.randint(0, 64, (count, side, side), generator=rng)
        y = torch.full((count, side, side), _BACKGROUND)
        for scene in range(count):
            for k in torch.randint(len(ink), (self._digits,), generator=rng).tolist():
                top, left = torch.randint(0, side - 7, (2,), generator=rng).tolist()
                place = (scene, slice(top, top + 8), slice(left, left + 8))
                seen = ink[k] >= _INK
                x[place] = torch.where(seen, (ink[k] * 255 / 16).long(), x[place])
                y[place] = torch.where(seen, names[k], y[place])
        return x.to(torch.uint8)[:, None], y

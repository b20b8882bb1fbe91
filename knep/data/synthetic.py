"""Images made up from a seed: for tests, benchmarks and data sets that are not there yet."""

from __future__ import annotations

import torch
from torch import Tensor

from knep.config.budget import check_room
from knep.data.base import Arrays, InMemory
from knep.errors import InputError
from knep.utils.rng import generator

_CLASSES = 10_000


class Synthetic(InMemory):
    """One smooth random prototype per class plus Gaussian noise, rendered to uint8.

    images: training images; image_size: pixels of a side; channels: 1 or 3; classes; noise: standard deviation in grey
    levels of 0..255, at least 0. Raises InputError for values that make no images.
    """

    def __init__(
        self,
        *,
        images: int = 1000,
        image_size: int = 16,
        channels: int = 1,
        classes: int = 10,
        noise: float = 40.0,
        **common: int,
    ) -> None:
        for name, value in (("images", images), ("image_size", image_size), ("channels", channels)):
            if value < 1:
                raise InputError(f"data.{name}={value} must be at least 1")
        if classes < 2:
            raise InputError(f"data.classes={classes} must be at least 2")
        if classes > _CLASSES:
            raise InputError(f"data.classes={classes} must be at most {_CLASSES}: images are made and split by class")
        if images < 4 * classes:
            raise InputError(f"data.images={images} must be at least {4 * classes}, 4 of each class")
        if noise < 0:
            raise InputError(f"data.noise={noise} must not be negative")
        super().__init__(**common)  # type: ignore[arg-type]
        # Noise and its sum with the prototypes as float32, for the training and the test images.
        need = 10 * images * channels * image_size**2
        check_room(need, f"data.images={images} of data.image_size={image_size} need", "write smaller numbers")
        self._shape = (channels, image_size, image_size)
        self._images, self._classes, self._noise = images, classes, noise

    def _arrays(self) -> Arrays:
        draw = generator(self.split_seed, 4)
        coarse = torch.randn(self._classes, self._shape[0], 4, 4, generator=draw)
        prototypes = torch.nn.functional.interpolate(coarse, self._shape[1:], mode="bilinear") * 50 + 128
        train = self._render(prototypes, self._images, draw)
        test = self._render(prototypes, max(self._images // 4, 2 * self._classes), draw)
        return Arrays(*train, *test, [f"class {k}" for k in range(self._classes)])

    def _render(self, prototypes: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.arange(count) % self._classes
        x = prototypes[y] + self._noise * torch.randn(count, *self._shape, generator=draw)
        return x.round().clamp(0, 255).to(torch.uint8), y

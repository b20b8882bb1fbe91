"""Rows made up from a seed, for any task: for tests, benchmarks and data sets that are not there yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knep.config.budget import check_room
from knep.data.base import Arrays, InMemory
from knep.errors import InputError
from knep.utils.monitors import OF_TASK
from knep.utils.rng import generator

_CLASSES = 10_000


class Synthetic(InMemory):
    """One smooth random prototype per class plus Gaussian noise, rendered to uint8.

    images: training images; image_size: pixels of a side; channels: 1 or 3; classes; noise: standard deviation in grey
    levels of 0..255, at least 0. task: what the targets are for. "multilabel": the prototypes of all labels that hold,
    added up; "regression": of all numbers, as much of each as the number says, in units of its own; "binary": whether
    the prototype is one of the later half; "segmentation": bright rectangles, a class for each brightness; "tokens" and
    "tagging": sequences of image_size tokens that count up by a step of their own, tagged by it.
    Raises InputError for values that make no rows.
    """

    def __init__(
        self,
        *,
        images: int = 1000,
        image_size: int = 16,
        channels: int = 1,
        classes: int = 10,
        noise: float = 40.0,
        task: str = "multiclass",
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
        if task not in OF_TASK:
            raise InputError(f"data.task={task} has no rows: write one of {', '.join(OF_TASK)}")
        super().__init__(**common)  # type: ignore[arg-type]
        # Noise and its sum with the prototypes as float32, for the training and the test images.
        need = 10 * images * channels * image_size**2
        check_room(need, f"data.images={images} of data.image_size={image_size} need", "write smaller numbers")
        self._shape = (channels, image_size, image_size)
        self._images, self._classes, self._noise, self._task = images, classes, noise, task

    def _arrays(self) -> Arrays:
        draw = generator(self.split_seed, 4)
        if self._task in ("tokens", "tagging"):
            return self._sequences(draw)
        coarse = torch.randn(self._classes, self._shape[0], 4, 4, generator=draw)
        prototypes = torch.nn.functional.interpolate(coarse, self._shape[1:], mode="bilinear") * 50 + 128
        make = {
            "multilabel": self._labelled,
            "regression": self._measured,
            "segmentation": self._drawn,
        }.get(self._task, self._render)
        train = make(prototypes, self._images, draw)
        test = make(prototypes, max(self._images // 4, 2 * self._classes), draw)
        if self._task == "binary":
            train, test = ((x, (2 * y // self._classes).clamp(max=1)) for x, y in (train, test))
            return Arrays(*train, *test, ["no", "yes"])
        word = {"multilabel": "label", "regression": "target"}.get(self._task, "class")
        return Arrays(*train, *test, [f"{word} {k}" for k in range(self._classes)])

    def _seen(self, x: Tensor, draw: torch.Generator) -> Tensor:
        """uint8, with noise."""
        noisy = x + self._noise * torch.randn(x.shape, generator=draw)
        return noisy.round().clamp(0, 255).to(torch.uint8)

    def _labelled(self, prototypes: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.rand(count, self._classes, generator=draw) < 0.3
        x = torch.einsum("nk,kchw->nchw", y.float(), prototypes - 128) + 128
        return self._seen(x, draw), y

    def _measured(self, prototypes: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        share = torch.rand(count, self._classes, generator=draw) * 2 - 1
        x = torch.einsum("nk,kchw->nchw", share, prototypes - 128) + 128
        units = 100.0 + 10 * torch.arange(self._classes)
        return self._seen(x, draw), units * (10 + share)

    def _drawn(self, prototypes: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        side = self._shape[1]
        corner = torch.randint(0, max(1, side // 2), (2, count, 1), generator=draw)
        at = torch.arange(side)
        inside = (at >= corner) & (at < corner + (side + 1) // 2)
        box = inside[0][:, :, None] & inside[1][:, None, :]
        y = torch.where(box, (torch.arange(count) % (self._classes - 1) + 1)[:, None, None], 0)
        bright = y[:, None] * (200 / (self._classes - 1)) + 25
        return self._seen(bright.expand(-1, self._shape[0], -1, -1), draw), y

    def _sequences(self, draw: torch.Generator) -> Arrays:
        parts: list[Any] = []
        for count in (self._images, max(self._images // 4, 2 * self._classes)):
            step = torch.randint(1, 3, (count, 1), generator=draw)
            start = torch.randint(0, self._classes, (count, 1), generator=draw)
            ids = (start + step * torch.arange(self._shape[1])) % self._classes
            parts += [ids, ids if self._task == "tokens" else (step - 1).expand_as(ids).clone()]
        names = [f"token {k}" for k in range(self._classes)] if self._task == "tokens" else ["by one", "by two"]
        return Arrays(parts[0], parts[1], parts[2], parts[3], names, self._classes)

    def _render(self, prototypes: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.arange(count) % self._classes
        x = prototypes[y] + self._noise * torch.randn(count, *self._shape, generator=draw)
        return x.round().clamp(0, 255).to(torch.uint8), y

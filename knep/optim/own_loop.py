"""Averaging and stopping for a loop of one's own: the same rules as the callbacks', called by name.

A second time, since a Lightning callback carries hooks, checkpoints and a copy of the module, of which a loop has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from knep.errors import InputError

WARMUPS = ("ratio", "power", "none")


def ema_decay(decay: float, n: int, warmup: str = "ratio") -> float:
    """The decay of the n-th update after the first weights, so that a short run is not held by its start.

    ratio: min(decay, (1 + n) / (10 + n)), of TensorFlow's averages, timm's and diffusers' first one; power: min(decay,
    1 - (1 + n)^(-2/3)), of k-diffusion, timm's ModelEmaV3 and diffusers' `use_ema_warmup`; none: decay.
    """
    most = {"ratio": (1 + n) / (10 + n), "power": 1 - (1 + n) ** (-2 / 3), "none": 1.0}[warmup]
    return min(decay, most)


class ModelAverage:
    """An average of a model's parameters: `update()` after each step, `with average.swapped():` to evaluate with it.

    The buffers of the model, batch norm's statistics among them, are those of the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._average: list[Tensor] = []
        self.count = 0  # weights in the average

    @torch.no_grad()
    def update(self, score: float | None = None) -> None:
        """Takes the present weights in. score: of a validation, which averaging=soup asks for."""
        current = [p.detach() for p in self._model.parameters()]
        if not self.count:
            self._average = [p.clone() for p in current]
        else:
            torch._foreach_lerp_(self._average, current, self._weight())
        self.count += 1

    def _weight(self) -> float:
        """Of the present weights in the average, which has `count` already."""
        raise NotImplementedError

    @contextmanager
    def swapped(self, batches: Iterable[Tensor] | None = None) -> Iterator[nn.Module]:
        """The model with the average in it, and with its own weights again behind; before the first update, as it is.

        batches: inputs of training batches, on which batch norm's statistics are estimated for the average; without
        them a model that has batch norms is evaluated with the statistics of its own weights.
        """
        if not self.count:
            yield self._model
            return
        own = [p.detach().clone() for p in self._model.parameters()]
        statistics = [b.detach().clone() for b in self._model.buffers()]
        self._fill(self._average)
        try:
            if batches is not None:
                mode = self._model.training
                with torch.no_grad():
                    update_bn(batches, self._model)
                self._model.train(mode)
            yield self._model
        finally:
            self._fill(own)
            with torch.no_grad():
                for buffer, value in zip(self._model.buffers(), statistics, strict=True):
                    buffer.copy_(value)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._model.parameters(), values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, object]:
        return {"average": self._average, "count": self.count}

    def load_state_dict(self, state: dict[str, object]) -> None:
        average, count = state["average"], state["count"]
        assert isinstance(average, list)
        assert isinstance(count, int)
        self._average, self.count = [value.clone() for value in average], count


class NoAverage(ModelAverage):
    """averaging=none: the weights are evaluated as they are."""

    def update(self, score: float | None = None) -> None:
        pass


class EmaAverage(ModelAverage):
    """As `knep.recipes.averaging.Ema`, with `ema_decay` at the n-th update after the first."""

    def __init__(self, model: nn.Module, decay: float, warmup: str = "ratio") -> None:
        super().__init__(model)
        self._decay, self._warmup = decay, warmup

    def _weight(self) -> float:
        return 1 - ema_decay(self._decay, self.count, self._warmup)


class SwaAverage(ModelAverage):
    """As `knep.recipes.averaging.Swa`, of the updates behind a share `start` of `updates`; all with updates=None."""

    def __init__(self, model: nn.Module, start: float, updates: int | None) -> None:
        super().__init__(model)
        self._first, self._seen = 0 if updates is None else int(start * updates), 0

    def update(self, score: float | None = None) -> None:
        self._seen += 1
        if self._seen > self._first:
            super().update()

    def _weight(self) -> float:
        return 1 / (self.count + 1)


class SoupAverage(ModelAverage):
    """As `knep.recipes.averaging.Soup`: the mean of the k best weights, by the score given to each update."""

    def __init__(self, model: nn.Module, k: int, mode: str) -> None:
        super().__init__(model)
        self._k, self._sign = k, 1 if mode == "min" else -1
        self._kept: list[tuple[float, list[Tensor]]] = []

    def update(self, score: float | None = None) -> None:
        if score is None:
            raise InputError("averaging=soup takes the best of several validations: write average.update(score)")
        own = [p.detach().clone() for p in self._model.parameters()]
        self._kept = sorted([*self._kept, (self._sign * score, own)], key=lambda kept: kept[0])[: self._k]
        self._average = [torch.stack(same).mean(0) for same in zip(*(values for _, values in self._kept), strict=True)]
        self.count = len(self._kept)


class Stopper:
    """Early stopping for a loop of one's own: `if stopper.update(metric): break`, once a validation.

    best: the best metric so far; improved: whether the last one was it, the time to save the weights.
    """

    def __init__(self, patience: float = math.inf, min_delta: float = 0.0, mode: str = "min") -> None:
        self._patience, self._delta, self._sign = patience, min_delta, 1 if mode == "min" else -1
        self.best, self.improved, self.waited = self._sign * math.inf, False, 0

    def update(self, metric: float) -> bool:
        """Whether to stop now; a metric that is no number never improves."""
        self.improved = self._sign * (self.best - metric) > self._delta
        self.waited = 0 if self.improved else self.waited + 1
        if self.improved:
            self.best = metric
        return self.waited >= self._patience

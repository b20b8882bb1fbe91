"""What a run says about its steps: the learning rate and the gradient's length, sampled and written in bundles."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_SECONDS = 2.0  # between bundles: often enough to watch a run, too rare to cost


class Dynamics:
    """Points (step, rate, norm before and after clipping) kept on the device and written in bundles.

    Adding a point never waits for the device; writing does, every two seconds and at the end of an epoch.
    """

    def __init__(self) -> None:
        self._points: list[tuple[int, float, Tensor]] = []
        self._clipped: deque[bool] = deque(maxlen=100)
        self._written = time.monotonic()
        self.last_step = -1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with; the points that wait are to be written before."""
        return {"clipped": list(self._clipped), "last_step": self.last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clipped.extend(state["clipped"])
        self.last_step = state["last_step"]

    def add(self, step: int, rate: float, before: Tensor, after: Tensor) -> None:
        """One point; before, after: gradient norms, 0-dim."""
        self._points.append((step, rate, torch.stack([before.detach().float(), after.detach().float()])))
        self.last_step = step

    @property
    def due(self) -> bool:
        return time.monotonic() - self._written > _SECONDS

    def write(self, loggers: Iterable[Any]) -> None:
        """Sends the points that wait to the loggers, in order."""
        loggers = list(loggers)
        for step, rate, norms in self._points:
            before, after = norms.tolist()
            # Two norms of the same gradients differ in rounding only; 1e-4 tells that from clipping, in bf16 too.
            self._clipped.append(abs(after - before) > 1e-4 * before)
            values = {
                "grad_norm/before_clip": before,
                "grad_norm/after_clip": after,
                "grad_norm/clipped_share": sum(self._clipped) / len(self._clipped),
                "lr": rate,
            }
            for logger in loggers:
                logger.log_metrics(values, step=step)
        self._points.clear()
        self._written = time.monotonic()

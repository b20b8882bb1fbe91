"""Loss spikes: a loss far above the last hundred, by a robust z-score."""

from __future__ import annotations

import statistics
from collections import deque

_WINDOW = 100
_FLOOR = 0.1  # nats: a loss that hardly moves, near zero for example, does not make an ordinary batch a spike
_NORMAL = 1.4826  # the deviation of a normal distribution over its median absolute deviation


class Spikes:
    """The last losses of accepted steps. limit: the z-score from which a loss is a spike; None: none is.

    z = (loss - median) / max(1.4826 MAD, 0.1), over the last 100 losses, where MAD is the median absolute deviation
    from their median (Hampel 1974). Nothing is a spike before there are 100, or below the largest of them.
    """

    def __init__(self, limit: float | None, losses: list[float] | None = None) -> None:
        self.limit = limit
        self._losses: deque[float] = deque(losses or (), maxlen=_WINDOW)

    def score(self, loss: float) -> float:
        """The robust z-score of a loss against the window, which must not be empty."""
        median = statistics.median(self._losses)
        spread = statistics.median(abs(x - median) for x in self._losses)
        return (loss - median) / max(_NORMAL * spread, _FLOOR)

    def strikes(self, loss: float) -> bool:
        """Whether this loss is a spike."""
        if self.limit is None or len(self._losses) < _WINDOW or loss <= max(self._losses):
            return False
        return self.score(loss) > self.limit

    def accept(self, loss: float) -> None:
        if self.limit is not None:
            self._losses.append(loss)

    @property
    def losses(self) -> list[float]:
        return list(self._losses)

"""What a search may spend: words such as 10m, 40runs or 20000steps, and what was spent so far."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from knep.errors import InputError
from knep.utils.text import shown

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_WORD = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|runs|steps)")
_MOST = 1e9


@dataclass(frozen=True)
class Budget:
    """amount: in `unit`, "seconds" of the clock, "runs" of whole length, or optimizer "steps"; text: as typed."""

    amount: float
    unit: str
    text: str

    @classmethod
    def read(cls, text: str) -> Budget:
        """Raises InputError for a word that is no budget."""
        found = _WORD.fullmatch(text)
        amount = float(found[1]) if found else 0.0
        if found is None or not 0 < amount <= _MOST:
            raise InputError(
                f"budget={shown(text)} is none: write minutes, hours or seconds as 10m, 2h or 600s, or 40runs, or "
                "20000steps"
            )
        if found[2] in _SECONDS:
            return cls(amount * _SECONDS[found[2]], "seconds", text)
        return cls(amount, found[2], text)


@dataclass
class Cost:
    """Of one trial. steps: of the optimizer; runs: as share of a whole one; seconds: of the clock."""

    steps: float = 0.0
    runs: float = 0.0
    seconds: float = 0.0

    def of(self, unit: str) -> float:
        return {"steps": self.steps, "runs": self.runs, "seconds": self.seconds}[unit]


@dataclass
class Purse:
    """What is left of a budget. clock: seconds; trials: how many were paid; cost: what was spent but seconds."""

    budget: Budget
    clock: Callable[[], float] = time.monotonic
    trials: int = 0
    cost: Cost = field(default_factory=Cost)
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def seconds(self) -> float:
        return self.clock() - self.began

    @property
    def spent(self) -> float:
        """In the budget's unit."""
        return self.seconds if self.budget.unit == "seconds" else self.cost.of(self.budget.unit)

    @property
    def left(self) -> float:
        return self.budget.amount - self.spent

    def pay(self, cost: Cost, trials: int = 1) -> None:
        self.trials += trials
        self.cost.steps += cost.steps
        self.cost.runs += cost.runs

    def bill(self) -> str:
        """What was spent, in every unit."""
        return (
            f"{self.trials} trials, {self.cost.runs:.1f} whole runs' worth of {self.cost.steps:,.0f} optimizer steps, "
            f"{self.seconds:,.0f} s of a budget of {self.budget.text}"
        )

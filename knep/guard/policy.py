"""`guard`: what is done about a step whose loss, gradient or weights are not finite, or whose loss is a spike."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from knep.errors import InputError

ACTIONS = ("none", "stop", "skip", "rollback")
# What can be wrong with a step, and how a line says it.
KINDS = {
    "loss": "the loss is not finite",
    "gradient": "the gradient is not finite",
    "weights": "the optimizer's step made weights that are not finite",
    "state": "the optimizer's state is not finite",
    "spike": "the loss is a spike",
    "elsewhere": "another process met a bad step",
}
# Kinds of which the whole step is repeated, with the optimizer's state.
OF_OPTIMIZER = ("weights", "state")


class Guard:
    """The rules of a run, and how often they were needed.

    action: none looks at nothing; stop ends the run and leaves a black box; skip drops the step; rollback drops it,
    goes back to the weights and the optimizer of the last checkpoint, and multiplies the learning rate by `backoff`.
    The step counts, and the schedule goes on, in either case. spike: the z-score (`knep.guard.loss_spikes`) from which
    a loss is a spike, in (0, inf), None for never; budget: interventions before the run is stopped, in [0, inf);
    backoff: in (0, 1]. Raises InputError outside.
    """

    def __init__(
        self, *, action: str = "stop", spike: float | None = None, budget: int = 10, backoff: float = 0.5
    ) -> None:
        if action not in ACTIONS:
            raise InputError(f"guard.action={action} is unknown: write one of {', '.join(ACTIONS)}")
        if spike is not None and not (_number(spike) and spike > 0):
            raise InputError(f"guard.spike={spike} must be a number above 0, or null for no look at spikes")
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 0:
            raise InputError(f"guard.budget={budget} must be a whole number of interventions, at least 0")
        if not (_number(backoff) and 0 < backoff <= 1):
            raise InputError(f"guard.backoff={backoff} must be in (0, 1]")
        self.action, self.spike, self.budget, self.backoff = action, spike, budget, float(backoff)
        self.counts: Counter[str] = Counter()
        self.factor = 1.0  # on every learning rate, after rollbacks

    @property
    def interventions(self) -> int:
        return self.counts.total()

    def decide(self, kind: str) -> str:
        """Counts a bad step of this kind (see KINDS) and says what to do: stop, skip or rollback."""
        self.counts[kind] += 1
        if self.action == "stop" or self.interventions > self.budget:
            return "stop"
        if self.action == "rollback":
            self.factor *= self.backoff
        return self.action

    def report(self) -> dict[str, Any]:
        """What the summary says: plain data."""
        return {"action": self.action, "interventions": self.interventions, **dict(self.counts)}

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts, self.factor = Counter(state_dict["counts"]), state_dict["factor"]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

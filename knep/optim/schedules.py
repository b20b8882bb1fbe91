"""What learning-rate schedules are built from: a factor as a function of the step, and its two torch schedulers.

Steps count optimizer steps from 0; a run of N steps uses the factors of steps 0 .. N - 1.
"""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from knep.utils.validation import check

Factor = Callable[[int], float]


def warmup_steps(total_steps: int, warmup: float) -> int:
    """Steps of warm-up in a run of `total_steps`: the rounded share `warmup` in [0, 1), but never all of them."""
    check("total_steps", total_steps, "[1, inf)")
    check("warmup", warmup, "[0, 1)")
    return min(round(warmup * total_steps), total_steps - 1)


def ramp(step: int, warm: int, start: float | None = None) -> float:
    """The factor of a linear warm-up over `warm` steps: 1/warm, 2/warm, ..., 1, and 1 ever after.

    start: the factor of step 0 in [0, 1], from which it rises so that step `warm` is the first at 1.
    """
    if not warm or step >= warm:
        return 1.0
    return (step + 1) / warm if start is None else start + (1 - start) * step / warm


def warmed(optimizer: Optimizer, warm: int, curve: Factor, start: float | None = None) -> LambdaLR:
    """Scales each group's own initial rate by ramp(step) * curve(steps since the end of the warm-up)."""
    return LambdaLR(optimizer, lambda step: ramp(step, warm, start) * curve(max(0, step - warm)))


def staircase(optimizer: Optimizer, warm: int, steps_per_epoch: int, curve: Factor) -> LambdaLR:
    """Scales each group's own initial rate by ramp(step) * curve(epoch), epochs counted from the run's first step."""
    check("steps_per_epoch", steps_per_epoch, "[1, inf)")
    return LambdaLR(optimizer, lambda step: ramp(step, warm) * curve(step // steps_per_epoch))


def rising(optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int, factor: float) -> LambdaLR:
    """Multiplies the rates by `factor` at each step: what a range test follows (Smith 2017, sec. 3.3)."""
    return LambdaLR(optimizer, lambda step: factor**step)


class Unchanged(LambdaLR):
    """`LambdaLR` of factor 1, whose steps only count: the rates are already what they would be set to."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, lambda step: 1.0)

    def step(self, epoch: int | None = None) -> None:
        if epoch is not None or self.last_epoch < 0:  # the first one, of the constructor, notes the rates
            super().step(epoch)
            return
        self._step_count += 1
        self.last_epoch += 1


class CycledMomentum(LambdaLR):
    """`LambdaLR` that sets momentum too, to momentum(step), in the groups that have any.

    Momentum is a group's `momentum` where it is above 0, else the first of its `betas`; plain SGD stays plain. Neither
    function is in the state, so a resumed run follows the schedule it was given, not the one that was stored.
    """

    def __init__(self, optimizer: Optimizer, factor: Factor, momentum: Factor) -> None:
        self._momentum = momentum
        super().__init__(optimizer, factor)

    def get_lr(self) -> list[Any]:
        for group in self.optimizer.param_groups:
            if group.get("momentum", 0) > 0:
                group["momentum"] = self._momentum(self.last_epoch)
            elif "betas" in group:
                group["betas"] = (self._momentum(self.last_epoch), *group["betas"][1:])
        return super().get_lr()

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_momentum"}

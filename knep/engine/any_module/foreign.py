"""Callbacks of others in the same Trainer that would act in a slot's place: refused, with what to write."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from knep.errors import InputError
from knep.recipes.averaging import Soup, WeightAverage


def refuse_doubles(trainer: Trainer, averaging: Callback, schedules: bool) -> None:
    """Raises InputError for another average beside the recipe's, and for a schedule that another one sets aside.

    averaging: of the recipe; schedules: whether the recipe has a schedule.
    """
    averages = isinstance(averaging, (WeightAverage, Soup))
    mine = type(averaging).__name__.lower()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, StochasticWeightAveraging) and (averages or schedules):
            wanted = " ".join(["scheduler=none"] * schedules + ["averaging=none"] * averages)
            also = f", and averages beside averaging={mine}" * averages
            raise InputError(
                f"{name} sets a schedule of its own in the place of the recipe's{also}: leave it out and write "
                f"averaging=swa, or load the recipe with {wanted}"
            )
        if isinstance(callback, WeightAveraging) and not isinstance(callback, WeightAverage) and averages:
            raise InputError(
                f"{name} and the recipe's averaging={mine} would both exchange the weights of validation: leave it "
                "out, or load the recipe with averaging=none"
            )

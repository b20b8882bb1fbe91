"""The arms of an ablation: a recipe without one of its tricks, and the bare recipe with one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knep.config.catalog import recipe_choices
from knep.errors import InputError

# What stands in a slot whose trick is taken away: the least that still trains.
PLAIN = {"scaling": "unit", "init": "default", "optimizer": "sgd"}
# Slots that say what is learned and how long, not by which trick.
_NO_TRICK = ("data", "model", "trainer")


@dataclass(frozen=True)
class Arm:
    """One treatment: override lines, and the arm that it is compared with ("" for one that is compared with none).

    slot, option: the trick whose effect this arm shows; sign: 1 where the arm has it and its control not, -1 where the
    arm lacks it; kind: "leave one out", "add one in", "base" or "choice".
    """

    name: str
    overrides: tuple[str, ...]
    control: str = ""
    slot: str = ""
    option: str = ""
    kind: str = "choice"
    sign: int = 1


def plain(slot: str) -> str:
    """The option of a slot without its trick."""
    return PLAIN.get(slot, "none")


def ablation(recipe: str, overrides: Sequence[str], slots: Sequence[str] | None = None) -> list[Arm]:
    """The whole recipe, the bare one, and for each trick of the recipe one arm without it and one with it alone.

    overrides: lines common to all arms; one that picks the option of a slot counts as the recipe's own.
    slots: only these. Raises InputError for a recipe that picks no trick, or a slot that it leaves plain.
    """
    picked = {slot: option for slot, option in recipe_choices(recipe).items() if slot not in _NO_TRICK}
    for line in overrides:
        key, _, value = line.partition("=")
        if key in picked or (key in PLAIN and key not in _NO_TRICK):
            picked[key] = value
    tricks = {slot: option for slot, option in picked.items() if option != plain(slot)}
    if not tricks:
        raise InputError(f"recipe={recipe} picks no trick that could be taken away: give another recipe")
    for slot in slots or ():
        if slot not in tricks:
            raise InputError(f"slots={slot}: recipe={recipe} has no trick there, write some of {','.join(tricks)}")
    common = (f"recipe={recipe}", *overrides)
    bare = {slot: f"{slot}={plain(slot)}" for slot in tricks}
    arms = [Arm("all", common, kind="base"), Arm("bare", (*common, *bare.values()), kind="base")]
    for slot, option in tricks.items():
        if slots and slot not in slots:
            continue
        others = tuple(line for other, line in bare.items() if other != slot)
        arms.append(Arm(f"without {slot}", (*common, bare[slot]), "all", slot, option, "leave one out", -1))
        arms.append(Arm(f"only {slot}", (*common, *others), "bare", slot, option, "add one in", 1))
    return arms


def choices(slot: str, options: Sequence[str], overrides: Sequence[str], control: str) -> list[Arm]:
    """One arm for each option of a slot, compared with the option `control`. Raises InputError where it is missing."""
    if control not in options:
        raise InputError(f"{slot}={control} is the control and must be among the options: {','.join(options)}")
    return [
        Arm(option, (*overrides, f"{slot}={option}"), "" if option == control else control, slot, option)
        for option in options
    ]

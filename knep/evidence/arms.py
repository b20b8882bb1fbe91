"""The arms of an ablation: a recipe without one of its tricks, and the bare recipe with one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knep.config.catalog import recipe_choices
from knep.config.stages import SLOT, as_option, listed
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

    Each stage of a list, `augment=[flip,erase]`, is a trick.
    overrides: lines common to all arms; one that picks the option of a slot counts as the recipe's own, and one that
    sets a key of a stage is left out of the arms that lack it.
    slots: only these. Raises InputError for a recipe that picks no trick, or a slot that it leaves plain.
    """
    picked = {slot: option for slot, option in recipe_choices(recipe).items() if slot not in _NO_TRICK}
    for line in overrides:
        key, _, value = line.partition("=")
        if key in picked or (key in PLAIN and key not in _NO_TRICK):
            picked[key] = value.strip("'\"").replace(" ", "")
    least = {slot: plain(slot) for slot in picked}
    if _reads_no_pixels(overrides) and "scaling" in picked:
        least["scaling"] = "none"
    tricks = {slot: option for slot, option in picked.items() if option != least[slot]}
    if not tricks:
        raise InputError(f"recipe={recipe} picks no trick that could be taken away: give another recipe")
    for slot in slots or ():
        if slot not in tricks:
            raise InputError(f"slots={slot}: recipe={recipe} has no trick there, write some of {','.join(tricks)}")
    common = (f"recipe={recipe}", *overrides)
    bare = {slot: f"{slot}={least[slot]}" for slot in tricks}
    arms = [Arm("all", common, kind="base"), Arm("bare", _with(common, *bare.values()), kind="base")]
    for slot, option in tricks.items():
        if slots and slot not in slots:
            continue
        others = tuple(line for other, line in bare.items() if other != slot)
        for name, trick, less, only in _parts(slot, option):
            arms.append(Arm(f"without {name}", _with(common, less), "all", slot, trick, "leave one out", -1))
            arms.append(Arm(f"only {name}", _with(common, *others, *only), "bare", slot, trick, "add one in", 1))
    return arms


def _reads_no_pixels(overrides: Sequence[str]) -> bool:
    """Of tables, texts and tokens, which scaling=unit refuses."""
    return any(line in ("data=csv", "data=text", "task=tokens", "task=tagging") for line in overrides)


def _parts(slot: str, option: str) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """For each trick of a slot its name, its option, the line that leaves it out, and those that leave it alone."""
    stages = listed(option) if slot == SLOT else None
    if stages is None or len(stages) == 1:
        return [(slot, option, f"{slot}={plain(slot)}", ())]
    without = [as_option(name for name in stages if name != stage) for stage in stages]
    return [
        (f"{slot}.{stage}", stage, f"{slot}={rest}", (f"{slot}={as_option([stage])}",))
        for stage, rest in zip(stages, without, strict=True)
    ]


def _with(common: Sequence[str], *lines: str) -> tuple[str, ...]:
    """The lines of an arm; keys of stages that it lacks are left out."""
    said = [line.partition("=")[2] for line in lines if line.startswith(f"{SLOT}=")]
    kept = tuple(f"{SLOT}.{stage}." for stage in listed(said[-1]) or ()) if said else (f"{SLOT}.",)
    return (*(line for line in common if not line.startswith(f"{SLOT}.") or line.startswith(kept)), *lines)


def choices(slot: str, options: Sequence[str], overrides: Sequence[str], control: str) -> list[Arm]:
    """One arm for each option of a slot, compared with the option `control`. Raises InputError where it is missing."""
    if control not in options:
        raise InputError(f"{slot}={control} is the control and must be among the options: {','.join(options)}")
    return [
        Arm(option, (*overrides, f"{slot}={option}"), "" if option == control else control, slot, option)
        for option in options
    ]

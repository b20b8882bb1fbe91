"""`augment=[flip,erase]`: which stages may stand together, and in which order. No torch, no Hydra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from knep.errors import InputError

SLOT = "augment"
TARGET = "knep.recipes.augment.stages.Stages"
MIXING = ("mixup", "cutmix", "mixup_cutmix")
# Of each of these kinds a list has one: a second would mix what is mixed, or mirror what is mirrored.
_ONE_OF = {
    "mixes images": MIXING,
    "is a policy of operations": ("trivial", "rand_augment", "auto_augment", "aug_mix", "three_augment"),
    "mirrors images": ("flip", "shift_flip"),
    "shifts images": ("shift", "shift_flip"),
}
# What leaves a mask that no longer says what is where; all others move masks along, or leave places alone.
NO_MASKS = (*MIXING, "trivial", "aug_mix", "erase")
# Views are made of single images, by moves and colours, and are hidden and mixed last. timm erases after mixing where
# its loader does both and before it elsewhere, as DeiT and torchvision do: either order is taken.
_FIRST, _LAST = ("repeats",), (*MIXING, "erase")


def as_option(stages: Iterable[str]) -> str:
    """How a list of stages is written, on a command line and as the choice of the slot."""
    return f"[{','.join(stages)}]"


def listed(option: object) -> list[str] | None:
    """The stages of "[flip,erase]" in their order; None for a single option."""
    if not isinstance(option, str) or not (option.startswith("[") and option.endswith("]")):
        return None
    return [name.strip() for name in option[1:-1].split(",")] if option[1:-1].strip() else []


def stages_of(option: str) -> list[str]:
    """The stages of a choice of the slot: one, or those of a list."""
    names = listed(option)
    return [option] if names is None else names


def without(option: str, stage: str) -> str:
    """The override line that leaves a stage out."""
    names = listed(option) or []
    left = [name for name in names if name != stage]
    return f"{SLOT}={as_option(left) if left else 'none'}"


def refuse_stages(names: Sequence[str]) -> None:
    """Raises InputError for stages that cannot stand together, or not in this order, with the line to write."""
    said = f"{SLOT}={as_option(names)}"
    if not names:
        raise InputError(f"{said} names no stage: write {SLOT}=none")
    if "none" in names:
        left = [name for name in names if name != "none"]
        raise InputError(f"{said} has none in a list: write {SLOT}={as_option(left) if left else 'none'}")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{said} names {twice} twice: write {SLOT}={as_option(dict.fromkeys(names))}")
    for what, kind in _ONE_OF.items():
        found = [name for name in names if name in kind]
        if len(found) > 1:
            raise InputError(f"{said}: {found[0]} {what}, and {found[1]} too: {_instead(names, found)}")
    ordered = in_order(names)
    if ordered != list(names):
        early, late = next((a, b) for a, b in pairwise(names) if _place(a) > _place(b))
        raise InputError(f"{said}: {early} acts on what {late} leaves: write {SLOT}={as_option(ordered)}")


def _instead(names: Sequence[str], found: Sequence[str]) -> str:
    if set(found) == {"mixup", "cutmix"}:
        one = "mixup_cutmix"
        return f"write {SLOT}={as_option(dict.fromkeys(one if name in found else name for name in names))}"
    return f"write {SLOT}={as_option(name for name in names if name not in found[1:])}"


def in_order(names: Iterable[str]) -> list[str]:
    """Stages as they may stand: views first, mixing and erasing last; others as they are."""
    return sorted(names, key=_place)


def _place(name: str) -> int:
    return 0 if name in _FIRST else 2 if name in _LAST else 1


def refuse_node(node: object) -> None:
    """The same of a config's node, whose stages stand beside their order."""
    if not isinstance(node, Mapping) or node.get("_target_") != TARGET:
        return
    held = [key for key in node if not key.startswith("_") and key != "order"]
    order = node.get("order") or held
    if not isinstance(order, Sequence) or isinstance(order, str) or not all(isinstance(name, str) for name in order):
        raise InputError(f"{SLOT}.order={order} is no list: write {SLOT}={as_option(held)}")
    refuse_stages(list(order))
    other = next((name for name in (*held, *order) if name not in held or name not in order), None)
    if other is not None:
        raise InputError(
            f"{SLOT}.{other} is no stage that is built and in its place: write {SLOT}={as_option(order)} alone"
        )


def option_of(node: Mapping[str, Any]) -> str | None:
    """The choice that a node stands for where it is a list of stages."""
    if node.get("_target_") != TARGET:
        return None
    return as_option(node.get("order") or [key for key in node if not key.startswith("_") and key != "order"])

"""Keys of a stage that is not there, or written as if there were one option, or several: what to write instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from knep.config.stages import SLOT, as_option, in_order, listed, stages_of


def stage_line(rest: str, value: str, option: str, keys: Mapping[str, Sequence[str]]) -> str | None:
    """Why `augment.{rest}={value}` is refused under a choice of the slot; None where stages have no part in it.

    keys: option of the slot -> the keys of its file.
    """
    stage, dot, key = rest.partition(".")
    stages = stages_of(option)
    if not dot and listed(option):
        has = [name for name in stages if rest in keys.get(name, ())]
        return f"{SLOT}={option} has {rest} in {has[0]}: write {SLOT}.{has[0]}.{rest}={value}" if has else None
    if not dot or stage not in keys or key not in keys[stage] or (stage in stages and listed(option)):
        return None
    if stage in stages:
        return f"{SLOT}={option} is no list: write {SLOT}.{key}={value}"
    more = as_option(in_order([*(name for name in stages if name not in ("", "none")), stage]))
    return f"{SLOT}={option} has no {stage}: write {SLOT}={more} {SLOT}.{stage}.{key}={value}"

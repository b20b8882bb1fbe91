"""The line that an error offers is tried before it is offered: what stands in its way too is said beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from knep.errors import InputError

_OVERRIDE = r"[+~]{0,2}[a-z][\w./]*=[^\s,;:]+"
_OFFERED = re.compile(rf"\bwrite ({_OVERRIDE}(?: {_OVERRIDE})*)(?=$|, or |[,;:]? )")


def with_doubt(said: str, overrides: Sequence[str], tried: Callable[[list[str]], object]) -> str:
    """`said`, with what refuses the first line that it offers, if anything does.

    overrides: as they were typed; tried: raises InputError for overrides that cannot work.
    """
    found = _OFFERED.search(said)
    if found is None or "<" in found[1] or "mypkg" in found[1]:
        return said
    offered = found[1].split(" ")
    keys = {_key(line) for line in offered}
    # What was refused goes, and so do earlier choices for what is offered, with the values of these.
    groups = {key for key in keys if "." not in key}
    kept = [line for line in overrides if _key(line) not in keys and _key(line).partition(".")[0] not in groups]
    innocent = [line for line in kept if not _blamed(line, said[: found.start()])]
    try:
        tried([*kept, *offered])  # what an option contradicts stays, where the offered one fits it
    except InputError:
        pass
    else:
        return said
    try:
        tried([*innocent, *offered])
    except InputError as error:
        why = str(error)
        about = any(key in why for key in (*keys, *(key.partition(".")[0] for key in keys)))
        # What it says of another part of the command line is told when that is all that is wrong.
        if about and why != said and why not in said and not _offers(why, found[1]):
            return f"{said}; but then: {why}"
    return said


def _key(line: str) -> str:
    return line.lstrip("+~").partition("=")[0].partition("@")[0]


def _blamed(line: str, said: str) -> bool:
    """Whether an error speaks of an override: by its key or as it was typed."""
    return re.search(rf"(?<![\w.]){re.escape(_key(line))}(?![\w.])", said) is not None or line in said


def _offers(why: str, line: str) -> bool:
    return f"write {line}" in why

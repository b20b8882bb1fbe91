"""What a file may hold: checks of plain data that say where it is wrong, and in which way.

A check is a function of a value that returns what is wrong, as the rest of a sentence that begins with the value's
place (".kept[0] is text, not a number"), or None. They nest as the data does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from knep.utils.text import shortened

Check = Callable[[Any], str | None]

_DEEPEST = 30
MOST = 2**53  # of what is counted: more cannot be told apart as floats, which is what some counters end as
_WORDS = {"NoneType": "nothing", "bool": "true or false", "str": "text", "int": "a whole number", "float": "a number"}


def _is(value: object, wanted: str) -> str:
    kind = type(value).__name__
    return f" is {_WORDS.get(kind, f'a {shortened(kind)}')}, not {wanted}"


def whole(low: int = 0, high: int = MOST) -> Check:
    """A whole number in [low, high]; true and false are none."""

    def check(value: object) -> str | None:
        if type(value) is not int:
            return _is(value, "a whole number")
        if low <= value <= high:
            return None
        size = str(value) if abs(value) <= MOST else f"a number of {value.bit_length()} bits"
        return f" is {size}, not within {low} and {high}"

    return check


def number(low: float = -math.inf, high: float = math.inf, finite: bool = True) -> Check:
    """A number in [low, high]. finite: False lets infinities and NaN pass."""

    def check(value: Any) -> str | None:
        if type(value) not in (int, float):
            return _is(value, "a number")
        if type(value) is int and abs(value) > MOST:
            return f" has {value.bit_length()} bits, more than a float can tell apart"
        if not finite and not math.isfinite(value):
            return None
        return None if math.isfinite(value) and low <= value <= high else f" is {value}, not within {low} and {high}"

    return check


def flag(value: object) -> str | None:
    """true or false."""
    return None if type(value) is bool else _is(value, "true or false")


def nothing(value: object) -> str | None:
    return None if value is None else _is(value, "nothing")


def text(pattern: str = r".*", most: int = 10_000) -> Check:
    """Text that `pattern` matches whole, of at most so many characters."""
    known = re.compile(pattern, re.DOTALL)

    def check(value: object) -> str | None:
        if type(value) is not str:
            return _is(value, "text")
        if len(value) > most:
            return f" has {len(value):,} characters"
        return None if known.fullmatch(value) else f" is {shortened(repr(value), 60)}"

    return check


def same(wanted: object) -> Check:
    """This value, of this type; a list stands for a tuple."""

    def check(value: object) -> str | None:
        if isinstance(wanted, (list, tuple)):
            return items(*map(same, wanted))(value)
        if type(value) is not type(wanted):
            return _is(value, shortened(repr(wanted), 60))
        alike = value == wanted or (value != value and wanted != wanted)
        return None if alike else f" is {shortened(repr(value), 60)}, not {shortened(repr(wanted), 60)}"

    return check


def one_of(*values: object) -> Check:
    """One of these values."""

    def check(value: object) -> str | None:
        found = any(same(v)(value) is None for v in values)
        return None if found else f" is {shortened(repr(value), 60)}, not one of {', '.join(map(repr, values))}"

    return check


def either(*checks: Check) -> Check:
    """What one of the checks lets pass; otherwise what the first one says."""

    def check(value: object) -> str | None:
        said = [c(value) for c in checks]
        return None if None in said else said[0]

    return check


def items(*checks: Check) -> Check:
    """A list or tuple with one item for each check."""

    def check(value: Any) -> str | None:
        wrong = _length(value, len(checks), len(checks))
        return wrong or next(
            (f"[{i}]{w}" for i, (c, v) in enumerate(zip(checks, value, strict=True)) if (w := c(v))), None
        )

    return check


def listed(each: Check, least: int = 0, most: int = 1_000_000) -> Check:
    """A list or tuple of so many items, each of which `each` lets pass."""

    def check(value: Any) -> str | None:
        wrong = _length(value, least, most)
        return wrong or next((f"[{i}]{w}" for i, v in enumerate(value) if (w := each(v))), None)

    return check


def _length(value: Any, least: int, most: int) -> str | None:
    if type(value) not in (list, tuple):
        return _is(value, "a list")
    if least <= len(value) <= most:
        return None
    return f" has {len(value):,} items, not " + (f"{least:,}" if least == most else f"{least:,} to {most:,}")


def table(each: Check, key: Check | None = None, most: int = 1_000_000) -> Check:
    """A dict of values that `each` lets pass under keys that `key` does, any text where it is None."""
    named = key or text()

    def check(value: object) -> str | None:
        if not isinstance(value, dict):
            return _is(value, "a dict")
        if len(value) > most:
            return f" has {len(value):,} keys"
        odd = next((f" has the key {shortened(repr(k), 60)}, which{w}" for k in value if (w := named(k))), None)
        return odd or next((f"{_at(k)}{w}" for k, v in value.items() if (w := each(v))), None)

    return check


def record(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None, closed: bool = True) -> Check:
    """A dict with each key of `needed`, perhaps those of `optional`, and no others. closed: False lets others be."""
    known = {**needed, **(optional or {})}

    def check(value: object) -> str | None:
        if not isinstance(value, dict):
            return _is(value, "a dict")
        missing = next((key for key in needed if key not in value), None)
        if missing is not None:
            return f" has no {missing}"
        odd = [key for key in value if key not in known] if closed else []
        if odd:
            return f" has the key {shortened(repr(odd[0]), 60)}, which nothing reads"
        return next((f"{_at(k)}{w}" for k, c in known.items() if k in value and (w := c(value[k]))), None)

    return check


def alike(sample: object, also: Mapping[str, Check] | None = None) -> Check:
    """What is built like `sample`: the same keys and types, whole numbers not negative, numbers finite, text the same.

    also: checks for keys of dicts that go before what their sample says.
    """
    if isinstance(sample, dict):
        return record({k: (also or {}).get(k) or alike(v, also) for k, v in sample.items()})
    if isinstance(sample, (list, tuple)):
        return items(*(alike(v, also) for v in sample))
    if type(sample) is int:
        return whole(min(0, sample))
    if type(sample) is float:
        return number(finite=math.isfinite(sample))
    return flag if type(sample) is bool else same(sample)


def _at(key: object) -> str:
    return f".{shortened(str(key), 80)}"


def plain(value: object, depth: int = 0) -> str | None:
    """What a config is made of: text, numbers, true, false, nothing, and lists and dicts of them."""
    if depth > _DEEPEST:
        return f" has more than {_DEEPEST} levels"
    if isinstance(value, dict):
        return table(lambda v: plain(v, depth + 1))(value)
    if isinstance(value, (list, tuple)):
        return listed(lambda v: plain(v, depth + 1))(value)
    if type(value) is int:
        return whole(-(2**64), 2**64)(value)
    return None if type(value) in (str, float, bool, type(None)) else _is(value, "text, a number, a list or a dict")


def anything(value: object) -> str | None:
    """Looked at elsewhere."""

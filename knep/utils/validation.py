"""The range of a hyper-parameter, checked where a trick is built."""

from knep.errors import InputError


def check(name: str, value: object, interval: str) -> None:
    """InputError unless the number `value` lies in `interval`, written as in mathematics: "[0, 1)", "(0, inf)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    number = float(value) if isinstance(value, (int, float)) else float("nan")
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise InputError(f"{name} must be a number in {interval}, got {value}")


def whole(name: str, value: object, least: int) -> None:
    """InputError unless `value` is a whole number from `least` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number from {least} on, got {value}")

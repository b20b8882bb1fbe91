"""Override lines, as Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from knep.config.command_line.aliases import to_type
from knep.errors import InputError
from knep.utils.text import shortened

_BRACKETS = 200

_SEVERAL = re.compile(r"\(?[-+.\de]+(,[-+.\de]+)+\)?")  # numbers with commas between


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's override objects. Raises InputError for a line that is none."""
    parser = OverridesParser.create()
    parsed = []
    for line in overrides:
        if max(line.count(bracket) for bracket in "[{(") > _BRACKETS:
            raise InputError(f"{line[:40]!r}... has more than {_BRACKETS} brackets: write a config file")
        try:
            parsed += parser.parse_overrides([line])
        except (HydraException, RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
            line = shortened(line, 120)
            key, equals, value = line.partition("=")
            how = f"{to_type(key, value)} for a value with special characters" if equals else "key=value"
            if _SEVERAL.fullmatch(value):
                how = f"{key}=[{value.strip('()')}] for a list, or -m {key}={value.strip('()')} for a run with each"
            raise InputError(f"{line!r} is not an override: write {how}") from error
    return parsed


def _line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line

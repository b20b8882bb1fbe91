"""Override lines, as Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from knep.config.command_line.aliases import quoted, to_type
from knep.errors import InputError
from knep.utils.text import shortened

_BRACKETS = 200

SEVERAL_NUMBERS = re.compile(r"\(?[-+.\de]+(,[-+.\de]+)+\)?")  # numbers with commas between


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
            if value.startswith("[") and value.endswith("]") and not set(value[1:-1]) & set("'\"{[("):
                # Quoted as a whole it would be a text and no list.
                value = f"[{','.join(quoted(part.strip()) for part in value[1:-1].split(','))}]"
                how = f'"{key}={value}" for names with special characters'
                raise InputError(f"{line!r} is not an override: write {how}") from error
            how = f"{to_type(key, value)} for a value with special characters" if equals else "key=value"
            if SEVERAL_NUMBERS.fullmatch(value):
                how = f"{key}=[{value.strip('()')}] for a list, or -m {key}={value.strip('()')} for a run with each"
            raise InputError(f"{line!r} is not an override: write {how}") from error
    return parsed


def line_of(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line

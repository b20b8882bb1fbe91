"""Bad input as one line on stderr and exit code 2, for every command; a run that failed as one with code 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from knep.errors import InputError, RunFailed
from knep.text import shortened

_LONGEST = 1000  # characters: what was wrong may be a list of a million


@contextmanager
def one_line() -> Iterator[None]:
    """Turns InputError into `knep: <line>` and exit code 2, RunFailed into the same and 1, Ctrl-C into 130."""
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's kernel names a backend that need not be here
    try:
        yield
    except (InputError, RunFailed) as error:
        print(f"knep: {shortened(' '.join(str(error).split()), _LONGEST)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None
    except KeyboardInterrupt:
        print("knep: stopped", file=sys.stderr)
        raise SystemExit(130) from None

"""What every command ends with: bad input as one line on stderr and code 2, a failed run as one with code 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from knep.cli.streams import lasting
from knep.errors import InputError, RunFailed, is_full
from knep.utils.text import shortened

_LONGEST = 1000  # characters: what was wrong may be a list of a million


@contextmanager
def one_line() -> Iterator[None]:
    """Turns InputError into `knep: <line>` and exit code 2, RunFailed into the same and 1, Ctrl-C into 130.

    A full disk is a failure; a reader that has left is none: see `knep.cli.streams`.
    """
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's kernel names a backend that need not be here
    with lasting():
        try:
            yield
        except (InputError, RunFailed) as error:
            raise _ended(str(error), 2 if isinstance(error, InputError) else 1) from None
        except KeyboardInterrupt:
            raise _ended("stopped", 130) from None
        except OSError as error:
            if not is_full(error):
                raise
            what = "what this command writes" if error.filename is None else error.filename
            raise _ended(f"{what} cannot be written ({error.strerror}): make room", 1) from None


def _ended(line: str, code: int) -> SystemExit:
    print(f"knep: {shortened(' '.join(line.split()), _LONGEST)}", file=sys.stderr)
    return SystemExit(code)

"""A run of train.py that ends with its first step: what a user waits for at the start."""

from __future__ import annotations

import os
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Runs `train.py` and leaves the process at the end of the first optimizer step."""
    from knep.cli import train

    def leave(*_: object) -> None:
        os._exit(0)

    import knep.engine.loops.lean

    knep.engine.loops.lean.LeanEpoch.on_advance_end = leave  # pyright: ignore[reportAttributeAccessIssue]
    train.main(list(arguments))

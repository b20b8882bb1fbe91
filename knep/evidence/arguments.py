"""The words of a study's command line: settings of the study itself, and override lines for its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knep.errors import InputError


@dataclass
class Settings:
    """seeds: 0 ... seeds - 1 are run; processes: trials side by side; out: the study's folder.

    target: validation accuracy (0..1) to which steps are counted, None for one that the controls reach; slots: of an
    ablation, None for all; budget: trials of a search. overrides: the lines that are no settings.
    """

    seeds: int = 5
    processes: int = 1
    out: Path | None = None
    target: float | None = None
    slots: list[str] | None = None
    budget: int = 15
    overrides: list[str] = field(default_factory=list)


def settings(words: Sequence[str], **defaults: int) -> Settings:
    """Raises InputError for a setting of the wrong kind, naming it."""
    found = Settings(**defaults)  # type: ignore[arg-type]
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"{word} is no setting: write key=value, for example seeds=5 or optimizer.lr=1e-3")
        if key in ("seeds", "processes", "budget"):
            least = 2 if key == "seeds" else 1
            if not value.isdecimal() or int(value) < least:
                raise InputError(f"{key}={value} is no whole number from {least} on: write for example {key}=5")
            setattr(found, key, int(value))
        elif key == "target":
            found.target = _share(value)
        elif key == "out":
            found.out = Path(value)
        elif key == "slots":
            found.slots = [s for s in value.strip("[]").split(",") if s]
        elif key == "seed":
            raise InputError(f"seed={value}: a study runs the seeds 0, 1, ..., write how many, for example seeds=5")
        else:
            found.overrides.append(word)
    return found


def _share(value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise InputError(f"target={value} is no validation accuracy: write a share between 0 and 1, for example 0.93")
    return share


def take(overrides: list[str], key: str, default: str) -> str:
    """Takes `key=value` out of the lines and returns the last value, or the default."""
    values = [line.partition("=")[2] for line in overrides if line.startswith(f"{key}=")]
    overrides[:] = [line for line in overrides if not line.startswith(f"{key}=")]
    return values[-1] if values else default

"""The words of a study's command line: settings of the study itself, and override lines for its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knep.config.instantiate import allow_typed
from knep.errors import InputError

_OF_TRIALS = {
    "seeds=5": "runs of each arm, the seeds 0 to 4",
    "processes=1": "trials side by side, each on one thread",
    "out=FOLDER": "where trials and report lie; called again, what is there is not run again",
}
_TARGET = {"target=0.93": "validation metric to which steps are counted; by default one that the controls reach"}
_LINES = {"any other key=value": "as for knep train, for all runs: data=fashion_mnist trainer.max_epochs=5"}
KEYS = {  # command -> what its words may be
    "ablate": {"recipe=digits_best": "the recipe", "slots=clip,norm": "of its slots only these"}
    | _OF_TRIALS
    | _TARGET
    | _LINES,
    "study": {"NAME": "a study of knep, or the path of a YAML file"} | _OF_TRIALS | _TARGET | _LINES,
    "compare": {
        "SLOT=a,b": "the options; the first is the one that others are compared with",
        "budget=15": "points of each option, three seeds a point, the lowest mean validation loss wins",
        "workloads=digits/mlp,digits/cnn": "data/model; by default what the other lines say",
        "sampler=qmc": "how points are chosen: qmc, tpe or random",
    }
    | _OF_TRIALS
    | {"seeds=5": "fresh seeds of each option's best point, 3 to 7: the search has 0 to 2"}
    | _LINES,
    "ledger": {
        "slots=init,norm": "of the slots only these",
        "workloads=digits/mlp": "of the workloads only these",
        "options=mine": "of one slot only these options, beside its control",
        "results=FOLDER": "where the cells go, by default those of the cards",
    }
    | _OF_TRIALS
    | {"seeds=10": "runs of each option, the seeds 0 to 9"},
    "cards": {"FOLDER": "docs/cards by default"},
    "verify": {
        "CARD": "adamw, optimizer/adamw, or today for two that change daily",
        "workload=digits/mlp": "by default the first that the card has",
        "seeds=10": "fresh seeds",
        "processes=1": "trials side by side",
    },
}
_SETTINGS = ("seeds", "processes", "out", "target", "slots", "budget")


def help_of(command: str) -> str:
    """The words of a command, a line each."""
    width = max(map(len, KEYS[command]))
    return "\n".join(["words:", *(f"  {key:{width}}  {what}" for key, what in KEYS[command].items())])


@dataclass
class Settings:
    """seeds: 0 ... seeds - 1 are run; processes: trials side by side; out: the study's folder.

    target: validation metric (accuracy in 0..1) to which steps are counted, None for one that the controls reach;
    slots: of an ablation, None for all; budget: trials of a search. overrides: the lines that are no settings.
    """

    seeds: int = 5
    processes: int = 1
    out: Path | None = None
    target: float | None = None
    slots: list[str] | None = None
    budget: int = 15
    overrides: list[str] = field(default_factory=list)


def settings(command: str, words: Sequence[str], **defaults: int) -> Settings:
    """Raises InputError for a setting of the wrong kind, or of another command, naming it."""
    found = Settings(**defaults)  # type: ignore[arg-type]
    read = [name.partition("=")[0] for name in KEYS[command] if "=" in name]
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"{word} is no setting: write key=value, for example seeds=5 or optimizer.lr=1e-3")
        if key in _SETTINGS and key not in read:
            raise InputError(f"knep {command} does not read {word}: its settings are {', '.join(_named(read))}")
        if key in ("seeds", "processes", "budget"):
            least = 2 if key == "seeds" else 1
            if not value.isdecimal() or int(value) < least:
                raise InputError(f"{key}={value} is no whole number from {least} on: write for example {key}=5")
            setattr(found, key, int(value))
        elif key == "target":
            found.target = _positive(value)
        elif key == "out":
            found.out = Path(value)
        elif key == "slots":
            found.slots = [s for s in value.strip("[]").split(",") if s]
        elif key == "seed":
            raise InputError(f"seed={value}: a study runs the seeds 0, 1, ..., write how many, for example seeds=5")
        else:
            found.overrides.append(word)
    allow_typed(found.overrides)
    return found


def _named(read: Sequence[str]) -> list[str]:
    return [f"{name}=" for name in dict.fromkeys(read) if name.isidentifier() and name != "SLOT"]


def _positive(value: str) -> float:
    """Whether it may be above 1, the task's metric says (`knep.evidence.effects.Metric.check_target`)."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < math.inf:
        raise InputError(f"target={value} is no validation metric: write a number above 0, for example 0.93")
    return number


def take(overrides: list[str], key: str, default: str) -> str:
    """Takes `key=value` out of the lines and returns the last value, or the default."""
    values = [line.partition("=")[2] for line in overrides if line.startswith(f"{key}=")]
    overrides[:] = [line for line in overrides if not line.startswith(f"{key}=")]
    return values[-1] if values else default

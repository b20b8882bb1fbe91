"""What an attack is: a door, a function that builds its files, and how it may end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.exhaustive.fuzzing.arena import Outcome, run

from .doors import DOORS

MEMORY = 500 << 20
ASKED = 1 << 30  # address space: libraries and threads take some that is never touched


@dataclass(frozen=True)
class Place:
    """work: where the attack's files lie and knep may write; outside: where it may not; canary: what code leaves."""

    work: Path
    outside: Path

    @property
    def canary(self) -> Path:
        return self.outside / "canary"

    @property
    def secret(self) -> Path:
        return self.outside / "secret"


@dataclass(frozen=True)
class Attack:
    """build: makes the files and returns the door's arguments; said: what the one line names.

    tamed: this one is no error: the run goes on, and `tamed` looks at what it left and says what is wrong, or "".
    refusal: one that is tamed may be refused as well. heavy: takes seconds to build, so `python -m tests.hostile` only.
    """

    door: str
    build: Callable[[Place], list[str]]
    said: str = ""
    tamed: Callable[[Place, Outcome], str] | None = None
    refusal: bool = False
    heavy: bool = False


@dataclass(frozen=True)
class Result:
    outcome: Outcome
    wrong: list[str]


def fight(attack: Attack, folder: Path) -> Result:
    """Runs one attack in its own folder, and says what went wrong."""
    place = Place(folder / "work", folder / "outside")
    for path in (place.work, place.outside):
        path.mkdir(parents=True)
    place.secret.write_text("the reader's own")
    arguments = attack.build(place)
    before = _state(place.outside)
    outcome = run(DOORS[attack.door], arguments, place.work)
    wrong = [] if _state(place.outside) == before else ["something outside changed"]
    return Result(outcome, wrong + _judge(attack, place, outcome))


def _state(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _judge(attack: Attack, place: Place, outcome: Outcome) -> list[str]:
    wrong = [f"ran: {event}" for event in outcome.events]
    if outcome.grew > MEMORY or outcome.asked > ASKED:
        wrong.append(f"took {outcome.grew >> 20} MB and asked for {outcome.asked >> 20} MB")
    if any((ord(c) < 32 and c not in "\n\r\t") or ord(c) == 127 for c in outcome.out + outcome.err):
        wrong.append("control characters reach the terminal")
    if attack.tamed is not None and not (attack.refusal and outcome.code == 2):
        said = attack.tamed(place, outcome)
        if outcome.code != 0:
            wrong.append(f"exit code {outcome.code}: {outcome.err[-300:]}")
        return [*wrong, said] if said else wrong
    if outcome.code != 2:
        wrong.append(f"exit code {outcome.code}, not 2: {outcome.err[-300:] or outcome.out[-300:]}")
    elif len(outcome.lines) != 1 or not outcome.err.startswith("knep: "):
        wrong.append(f"not one line: {outcome.err[-300:]}")
    elif attack.said not in outcome.err:
        wrong.append(f"does not say {attack.said!r}: {outcome.err.strip()}")
    return wrong

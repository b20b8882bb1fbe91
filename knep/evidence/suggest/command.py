"""`knep suggest LINES`: the three tricks most worth trying on a problem that the ledger has not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from knep.config.compose import Composed
from knep.doctor.cure.candidates import Way, merged, tidied
from knep.doctor.cure.result import command
from knep.errors import InputError
from knep.evidence.cards import advice
from knep.evidence.meta.random_effects import LEAST
from knep.evidence.meta.verdicts import Cells, spec, stored
from knep.evidence.suggest import features as feature
from knep.evidence.suggest.kriging import Model, Predicted
from knep.evidence.suggest.leave_out import COUNT, as_pairs
from knep.evidence.suggest.measured import measured, share


@dataclass(frozen=True)
class Candidate:
    """A trick that the ledger knows, with what it should do to a problem. places: workload -> effect measured."""

    slot: str
    option: str
    predicted: Predicted
    places: Mapping[str, float]

    @property
    def line(self) -> str:
        return f"{self.slot}={self.option}"


@dataclass
class Problem:
    """A run that can start: its lines, what they compose to, its data prepared, and its features."""

    lines: Way
    made: Composed
    data: Any
    features: feature.Features

    @classmethod
    def of(cls, lines: Sequence[str], search: Sequence[str] = ()) -> Problem:
        """Raises InputError as training does."""
        from knep.config.instantiate import allow_typed, instantiate
        from knep.errors import named
        from knep.run.run import check, hush

        hush()
        allow_typed(lines)
        made = check(list(lines), list(search))
        with named("data"):
            data = instantiate(made.run.data)
            data.prepare()
        return cls(tuple(lines), made, data, feature.of_run(made.run, data))

    def refusal(self, way: Sequence[str]) -> str | None:
        """Why this problem cannot have these lines too; None where it can. Nothing is trained."""
        from knep.engine.apply_recipe import plan_of_run
        from knep.run.run import check

        try:
            plan_of_run(check(list(tidied(merged(self.lines, way))), []).run, self.data)
        except InputError as error:
            return " ".join(str(error).split())
        return None


@dataclass
class Found:
    """The suggestions, best first; left_out: line -> why, of those that were predicted as well as these."""

    suggestions: list[Candidate] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def suggest(overrides: Sequence[str], as_json: bool = False) -> None:
    """Prints the suggestions for the run that the lines describe, each with what to write."""
    problem = Problem.of(overrides)
    found = suggestions(problem)
    if as_json:
        import json

        print(json.dumps(_data(problem, found), indent=1))
        return
    for line in _told(problem, found):
        print(line)


def suggestions(problem: Problem) -> Found:
    """COUNT tricks of the highest predicted effect above 0, each of another slot, that this problem can have."""
    found, slots = Found(), set()
    for one in ranked(problem):
        if len(found.suggestions) == COUNT or one.predicted.mean <= 0:
            break
        if one.slot in slots:
            continue
        reason = problem.refusal([one.line])
        if reason:
            found.left_out[one.line] = reason
        else:
            found.suggestions.append(one)
            slots.add(one.slot)
    return found


def ranked(problem: Problem) -> list[Candidate]:
    """Every trick that the ledger says something of for this problem, the highest predicted effect first."""
    ledger = stored()
    effects = measured(ledger, problem.made.choices)
    known = {trick: on for trick, on in effects.items() if len(on) >= LEAST}
    if not known:
        return []
    places = {name: one.vector for name, one in feature.stored().items()}
    model = Model.fitted([as_pairs(on) for on in known.values()], places)
    advised = set(against(problem.made.choices["data"]))
    idle = {(slot, option) for slot, option in known if _idle(ledger, slot, option)}
    found = [
        Candidate(
            slot, option, model.predict(as_pairs(on), problem.features.vector), {w: o.value for w, o in on.items()}
        )
        for (slot, option), on in known.items()
        if (slot, option) not in advised and (slot, option) not in idle
    ]
    return sorted(found, key=lambda one: -one.predicted.mean)


def against(data: str) -> Iterator[tuple[str, str]]:
    """Tricks that their card advises against on these data."""
    about = spec()
    for slot, by_option in about["against"].items():
        for option, workloads in by_option.items():
            if any(f"data={data}" in about["workloads"][name] for name in workloads):
                yield slot, option


def _idle(ledger: Cells, slot: str, option: str) -> bool:
    """Whether an option is the slot's plain one: to take something away is no trick to try."""
    return any(cell["option"] == option and not cell["control"] for cell in ledger[slot]) and slot != "optimizer"


def percent(value: float) -> str:
    """The share of the error that a predicted value removes, in percent."""
    return f"{100 * share(value):+.0f}"


def _told(problem: Problem, found: Found) -> list[str]:
    f = problem.features
    kinds = ", ".join(name for name, there in (("convolutions", f.convolutions), ("norms", f.norms)) if there)
    lines = [
        f"problem: {f.parameters:,} parameters in {f.depth} layers ({kinds or 'no convolutions, no norms'}), "
        f"{f.rows:,} training rows, gradient of the first layer 10^{f.gradient:+.1f} times the last one's"
    ]
    for number, one in enumerate(found.suggestions, 1):
        lines += ["", *_said(number, one, problem)]
    if len(found.suggestions) < COUNT:
        lines += ["", "nothing else in the ledger has a predicted effect above 0 here"]
    lines += [f"left out: {line}: {why}" for line, why in found.left_out.items()]
    return [*lines, "", *caveats(problem)]


def _said(number: int, one: Candidate, problem: Problem) -> list[str]:
    p = one.predicted
    seen = ", ".join(f"{name} {percent(value)} % (weight {p.weights[name]:.0%})" for name, value in one.places.items())
    lines = [
        f"{number}. {one.line}: should remove {percent(p.mean)} % of the error, 95 % interval "
        f"[{percent(p.low)}, {percent(p.high)}] %",
        f"   measured: {seen}",
    ]
    unwise = advice(one.slot, one.option)
    lines += [f"   when not: {unwise}"] if unwise else []
    return [*lines, f"   {command(tidied(merged(problem.lines, [one.line])))}"]


def caveats(problem: Problem) -> list[str]:
    """What the numbers do not say."""
    lines = [
        f"{len(feature.stored())} workloads say little of a new one, as the intervals show; nothing was tuned there. "
        "Three runs with it and three without, of the same seeds, say more: knep compare, or recipe=auto."
    ]
    if not (problem.features.images and problem.features.classes):
        here = " ".join(f"{group}={problem.made.choices[group]}" for group in ("task", "data"))
        lines.append(f"All of it was measured on image classification only, and this is {here}.")
    return lines


def _data(problem: Problem, found: Found) -> dict[str, Any]:
    def plain(one: Candidate) -> dict[str, Any]:
        p = one.predicted
        shares = {key: share(value) for key, value in (("mean", p.mean), ("low", p.low), ("high", p.high))}
        write = command(tidied(merged(problem.lines, [one.line])))
        return {"line": one.line, "error_removed": shares, "weights": dict(p.weights), "command": write}

    return {
        "features": asdict(problem.features),
        "suggestions": [plain(one) for one in found.suggestions],
        "left_out": found.left_out,
        "caveats": caveats(problem),
    }

"""How good predictions are: each workload of the ledger is left out in turn and predicted from the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knep.evidence.stats import holm
from knep.evidence.suggest.features import Features
from knep.evidence.suggest.kriging import Model, Predicted
from knep.evidence.suggest.measured import Effects, OnWorkload, share

LEAST = 2  # workloads beside the one left out: a trick of one says nothing of where it differs
COUNT = 3  # tricks that are suggested


@dataclass(frozen=True)
class Row:
    """A trick on the workload that was left out: what was predicted, and what was measured there."""

    slot: str
    option: str
    predicted: Predicted
    there: OnWorkload

    @property
    def covered(self) -> bool:
        return self.predicted.low <= self.there.value <= self.predicted.high

    @property
    def right(self) -> bool:
        """Whether the sign is."""
        return (self.predicted.mean > 0) == (self.there.value > 0)


@dataclass(frozen=True)
class Left:
    """One workload, left out. best: the largest share of the error that any trick removes there, of those predicted."""

    workload: str
    rows: Sequence[Row]

    @property
    def picked(self) -> list[Row]:
        return best_of_slots(self.rows)

    @property
    def gain(self) -> float:
        """Of the tricks that would have been suggested, the share of the error that the best of them removes."""
        return max(share(row.there.value) for row in self.picked)

    @property
    def best(self) -> float:
        return max(share(row.there.value) for row in self.rows)


def best_of_slots(rows: Sequence[Row]) -> list[Row]:
    """The COUNT of the highest predicted means, of each slot one: two optimizers cannot both be taken."""
    ranked = sorted(rows, key=lambda row: -row.predicted.mean)
    first = {row.slot: row for row in reversed(ranked)}
    return sorted(first.values(), key=lambda row: -row.predicted.mean)[:COUNT]


def leave_out(effects: Effects, features: Mapping[str, Features]) -> list[Left]:
    """Every workload, predicted by a model that has not seen it, its tricks' spread and reach neither."""
    return [_left(workload, effects, features) for workload in features]


def _left(workload: str, effects: Effects, features: Mapping[str, Features]) -> Left:
    seen = {trick: {w: one for w, one in on.items() if w != workload} for trick, on in effects.items()}
    known = {trick: as_pairs(on) for trick, on in seen.items() if len(on) >= LEAST}
    places = {name: one.vector for name, one in features.items()}
    model = Model.fitted(list(known.values()), places)
    rows = []
    for (slot, option), on in known.items():
        there = effects[slot, option].get(workload)
        if there is not None:
            rows.append(Row(slot, option, model.predict(on, places[workload], there.error), there))
    return Left(workload, rows)


def as_pairs(on: Mapping[str, OnWorkload]) -> dict[str, tuple[float, float]]:
    """workload -> (effect, standard error)."""
    return {workload: (one.value, one.error) for workload, one in on.items()}


def significant(left: Sequence[Left], corrected: bool) -> list[Row]:
    """Rows whose measured effect has p < 0.05 by Student's t; corrected: after Holm over all rows."""
    rows = [row for one in left for row in one.rows]
    ps = [row.there.p for row in rows]
    return [row for row, p in zip(rows, holm(ps) if corrected else ps, strict=True) if p < 0.05]


def table(left: Sequence[Left]) -> str:
    """A row for each workload and one for all, in Markdown."""
    head = (
        "| left out | tricks | interval holds | sign right, p < 0.05 | after Holm | best of three removes | oracle "
        "| share |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    strict = significant(left, corrected=True)
    rows = [_line(one.workload, [one], strict) for one in left]
    return "\n".join([head, *rows, _line("all", left, strict)])


def _line(name: str, left: Sequence[Left], strict: Sequence[Row]) -> str:
    rows = [row for one in left for row in one.rows]
    plain = significant(left, corrected=False)
    clear = [row for row in rows if row in strict]
    cells = [name, str(len(rows)), _part([row.covered for row in rows])]
    cells += [_part([row.right for row in some]) for some in (plain, clear)]
    gain, best = (sum(getattr(one, key) for one in left) / len(left) for key in ("gain", "best"))
    ratio = sum(one.gain / one.best for one in left) / len(left)
    return f"| {' | '.join([*cells, f'{gain:.0%}', f'{best:.0%}', f'{ratio:.0%}'])} |"


def _part(found: Sequence[bool]) -> str:
    return f"{sum(found)} of {len(found)}, {sum(found) / len(found):.0%}" if found else "none"

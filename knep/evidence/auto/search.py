"""The search: the rate first, then successive halving over tricks, then what survives together, then fresh seeds.

    plain -- the rate's own trials -- every trick, a third of a run, one seed -- the best third, whole, two seeds
          -- the best, one upon the other, three seeds -- fresh seeds of plain and winner, which chose nothing

Only the validation split is looked at; the test split is read by the last runs, after everything was chosen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from knep.doctor.cure.candidates import Way, key_of, merged
from knep.errors import InputError
from knep.evidence.auto.bench import Bench, Over, Refused
from knep.evidence.rate.command import lines_of
from knep.evidence.rate.find import rates
from knep.evidence.stats import LEAST_PAIRS, LEVEL, Effect, paired, verdict

CHOOSING = (0, 1, 2)  # seeds of the search
FRESH = range(len(CHOOSING), len(CHOOSING) + 10)  # of the last word, as many as there is room for, five at the least
SHORT = 1 / 3  # of a run's length, in the first rung
_KEPT = 1 / 3  # of a rung's tricks that come into the next
_LEAST_KEPT = 3
LEAST_RUNS = 28  # whole ones: ten for the last word, and a search that sees more than a trick or two
_OF_A_TRICK = 1.2  # whole runs that a trick costs the halving, those that are dropped early included
_TOGETHER = 0.25  # share of what is left for the search that stays for trying the best tricks together


@dataclass(frozen=True)
class Kept:
    """A trick of the recipe. before, after: the whole lines without and with it.

    chosen: its gain over the search's seeds, which is flattered, for it was picked by them; None where the lines before
    it failed, and where there was no room for those seeds, which `judged` tells apart.
    """

    way: Way
    before: Way
    after: Way
    chosen: Effect | None
    judged: bool = True


@dataclass
class Outcome:
    """What a search came to.

    start, lines: the plain line and the winner's; gains: way -> its mean gain when last tried, in the metric's unit;
    fresh: seeds of the last word; effect: the winner's there; steps: way -> its own part there; noise: the deviation of
    a paired difference, pooled over all that were tried, on `freedom` degrees of freedom; stopped: by Ctrl-C.
    """

    start: Way
    lines: Way
    kept: list[Kept] = field(default_factory=list)
    gains: dict[Way, float] = field(default_factory=dict)
    refused: dict[Way, str] = field(default_factory=dict)
    untried: list[Way] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    effect: Effect | None = None
    steps: dict[Way, Effect] = field(default_factory=dict)
    verdict: str = "too few pairs"
    noise: float = math.nan
    freedom: int = 0
    stopped: bool = False

    @property
    def proved(self) -> bool:
        """Whether fresh seeds bear out that the winner is better than the plain line."""
        return self.verdict == "helps"

    @property
    def blind(self) -> float:
        """The half-width of the interval of a gain over the search's seeds: less could not be seen. NaN: unknown."""
        if not self.freedom:
            return math.nan
        return float(stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * self.noise / len(CHOOSING) ** 0.5


@dataclass
class Search:
    """ways: tricks, the most promising first; rate: gives the lines of rates for the plain line, or none."""

    bench: Bench
    start: Way
    ways: Sequence[Way]
    rate: Callable[[], list[Way]]
    told: Callable[[str], None]
    pairs: list[list[float]] = field(default_factory=list)

    def run(self) -> Outcome:
        """Raises InputError and what trials raise where the plain line itself cannot run; Ctrl-C ends the search with
        what is known."""
        found = Outcome(self.start, self.start)
        try:
            self._chosen(found)
        except KeyboardInterrupt:
            found.stopped = True
        self._noise(found)
        if not found.stopped:
            try:
                self._proved(found)
            except KeyboardInterrupt:
                found.stopped = True
            self._judged(found)
        return found

    def _chosen(self, found: Outcome) -> None:
        try:
            self.bench.see(self.start, CHOOSING[0], SHORT)
        except Refused as refused:
            raise InputError(f"the plain line cannot be trained: {refused}") from refused
        self._room(found.lines)
        rates = self.rate()
        if len(rates) == 1:  # found by trials of its own; several were not tried yet
            self._added(found, rates)
        survivors = self._halved(found, [*(rates if len(rates) > 1 else ()), *self.ways])
        self._hoped(found, self._added(found, survivors))
        self._added(found, self._rates(found.lines))

    def _room(self, lines: Way) -> None:
        """Keeps back what the last word costs: five pairs of plain line and winner."""
        unit = self.bench.purse.budget.unit
        self.bench.reserve = LEAST_PAIRS * (self.bench.cost(self.start).of(unit) + self.bench.cost(lines).of(unit))

    def _halved(self, found: Outcome, ways: Sequence[Way]) -> list[Way]:
        """The ways that came through both rungs, the best first, and behind them those of the first; none that was
        worse than the plain line when last tried."""
        tried = self._affordable(found, ways)
        first = self._rung(found, tried, CHOOSING[:1], SHORT)
        count = max(_LEAST_KEPT, math.ceil(_KEPT * len(first)))
        second = self._rung(found, first[:count], CHOOSING[:2], 1.0)
        others = [way for way in first if way not in second and way not in found.refused]
        return [way for way in [*second, *others] if found.gains[way] >= 0]

    def _affordable(self, found: Outcome, ways: Sequence[Way]) -> list[Way]:
        """As many of the ways as the budget carries through the rungs."""
        unit = self.bench.purse.budget.unit
        room = (1 - _TOGETHER) * (self.bench.purse.left - self.bench.reserve)
        count = int(room / max(1e-9, _OF_A_TRICK * self.bench.cost(self.start).of(unit)))
        found.untried += ways[count:]
        return list(ways[:count])

    def _rung(self, found: Outcome, ways: Sequence[Way], seeds: Sequence[int], share: float) -> list[Way]:
        """The ways of a rung, the best first; those that cannot be done are noted, and those without room."""
        means: dict[Way, tuple[float, float]] = {}
        for number, way in enumerate(ways):
            lines = merged(found.lines, way)
            try:
                gains = [self.bench.gain(lines, found.lines, seed, share) for seed in seeds]
            except Refused as refused:
                found.refused[way] = str(refused)
                continue
            except Over:
                found.untried += [one for one in ways[number:] if one not in found.untried and one not in found.gains]
                break
            mean, loss = (statistics.fmean(parts) for parts in zip(*gains, strict=True))
            means[way], found.gains[way] = (mean, loss), mean
            if share == 1.0:
                self._noted([gain for gain, _ in gains])
            self.told(f"{' '.join(way)}: {self._signed(mean)}, {_of(len(seeds), share)}")
        return _ranked(means)

    def _added(self, found: Outcome, ways: Sequence[Way]) -> list[Way]:
        """Takes up the ways that do better than noise beside what was taken up before, of each slot one.

        Returns those for whose three seeds there was no room.
        """
        unjudged: list[Way] = []
        for way in ways:
            if {_slot(way)} & {_slot(kept.way) for kept in found.kept} and _slot(way) != "rate":
                continue
            lines = merged(found.lines, way)
            self._room(lines)
            try:
                pairs = [self.bench.gain(lines, found.lines, seed) for seed in CHOOSING]
            except Refused as refused:
                found.refused[way] = str(refused)
                continue
            except Over:
                found.untried += [way] if way not in found.gains else []
                unjudged.append(way)
                continue
            gains = [gain for gain, _ in pairs]
            found.gains[way] = statistics.fmean(gains)
            self._noted(gains)
            self._noise(found)
            if not math.isfinite(found.gains[way]):
                taken = found.gains[way] > 0
            else:
                least = found.noise / len(gains) ** 0.5 if found.freedom else 0.0
                taken = found.gains[way] > least
            self.told(
                f"{' '.join(way)}: {self._signed(found.gains[way])} over seeds 0 to 2, {'kept' if taken else 'left'}"
            )
            if taken:
                sides = [self.bench.signed(one, CHOOSING) for one in (lines, found.lines)]
                found.kept.append(Kept(way, found.lines, lines, _effect(*sides)))
                found.lines = lines
        self._room(found.lines)
        return unjudged

    def _hoped(self, found: Outcome, unjudged: Sequence[Way]) -> None:
        """The best of the rungs where there was no room to judge any: what is kept back for the last word does it."""
        better = [way for way in unjudged if 0 < found.gains.get(way, 0.0) < math.inf]
        if found.kept or not better:
            return
        way = max(better, key=lambda one: found.gains[one])
        self.told(f"{' '.join(way)}: the best so far, and the fresh seeds alone judge it")
        lines = merged(found.start, way)
        found.kept.append(Kept(way, found.start, lines, None, judged=False))
        found.lines = lines

    def _rates(self, lines: Way) -> list[Way]:
        """A third and three times the rate, once the tricks are chosen."""
        if lines == self.start:
            return []
        config = self.bench.trial(lines, 0, math.inf, False).made.config
        if not rates(config, 1.0):
            return []
        return [tuple(lines_of(config, factor)) for factor in (3.0, 1 / 3)]

    def _proved(self, found: Outcome) -> None:
        """Plain line and winner with fresh seeds, pair by pair; then the lines between, as far as there is room."""
        if found.lines == found.start:
            return
        for seed in FRESH:
            unit = self.bench.purse.budget.unit
            both = [self.bench.cost(lines).of(unit) for lines in (found.start, found.lines)]
            between = len(found.kept) - 1 if len(found.fresh) >= LEAST_PAIRS else 0
            if sum(both) * (1 + between / 2) > self.bench.purse.left:
                break
            try:
                for lines in (found.start, found.lines):
                    self.bench.see(lines, seed, tested=True, final=True)
            except (Over, Refused):
                break
            found.fresh.append(seed)
            (mine,), (plain,) = self._last(found.lines, [seed]), self._last(found.start, [seed])
            self.told(f"fresh seed {seed}: {self._signed(mine - plain)}")
        self._chain(found)

    def _chain(self, found: Outcome) -> None:
        """Each trick's own part on fresh seeds: with it against without it, in the order of their taking up."""
        seeds = found.fresh[:LEAST_PAIRS]
        for kept in found.kept:
            sides = []
            for lines in (kept.after, kept.before):
                ends = lines in (found.start, found.lines)
                try:
                    sides.append(self.bench.signed(lines, seeds, tested=ends, final=True))
                except (Over, Refused):
                    return
            own = _effect(*sides) if len(seeds) > 1 else None
            if own is not None:
                found.steps[kept.way] = own

    def _judged(self, found: Outcome) -> None:
        if len(found.fresh) < 2:
            return
        mine, plain = self._last(found.lines, found.fresh), self._last(found.start, found.fresh)
        found.effect = _effect(mine, plain)
        if found.effect is not None:
            found.verdict = verdict(found.effect, found.effect.p)
        elif len(found.fresh) >= LEAST_PAIRS:  # one of them failed, and loses
            better = all(map(math.isfinite, mine)) and all(a > b for a, b in zip(mine, plain, strict=True))
            found.verdict = "helps" if better else "no evidence"

    def _last(self, lines: Way, seeds: Sequence[int]) -> list[float]:
        return self.bench.signed(lines, seeds, tested=True, final=True)

    def _noted(self, gains: Sequence[float]) -> None:
        if len(gains) > 1 and all(map(math.isfinite, gains)):
            self.pairs.append(list(gains))

    def _noise(self, found: Outcome) -> None:
        """The deviation of differences around their own mean, pooled over the tricks that were tried."""
        found.freedom = sum(len(gains) - 1 for gains in self.pairs)
        if found.freedom:
            squares = sum(float(np.var(gains)) * len(gains) for gains in self.pairs)
            found.noise = (squares / found.freedom) ** 0.5

    def _signed(self, gain: float) -> str:
        return (
            f"{self.bench.metric.text(gain, signed=True)} {self.bench.metric.name}" if math.isfinite(gain) else "failed"
        )


def _ranked(means: Mapping[Way, tuple[float, float]]) -> list[Way]:
    """The best first, by metric; by loss where that is equal, as it often is over few validation rows. The loss alone
    would be unjust to tricks that smooth answers."""
    return sorted(means, key=lambda way: means[way], reverse=True)


def _effect(mine: Sequence[float], plain: Sequence[float]) -> Effect | None:
    """None where a side failed."""
    return paired(mine, plain) if all(map(math.isfinite, [*mine, *plain])) else None


def _of(seeds: int, share: float) -> str:
    length = "whole runs" if share == 1.0 else "a third of a run"
    return f"{length}, {seeds} seed{'s' if seeds > 1 else ''}"


def _slot(way: Way) -> str:
    """What two ways cannot both set; "rate" for the learning rate, which may be set twice."""
    key = key_of(way[0])
    return "rate" if key.endswith("lr") else key

"""What makes a run faster: overrides that might, each against the run as it is in alternating blocks of one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knep.config.compose import compose_config
from knep.doctor.findings import Finding, Report, finding, ordered
from knep.doctor.speed.timing import Block, block
from knep.errors import InputError

_PAIRS = 5
_SECONDS = 0.4  # of a block
_STEPS = (6, 100)  # of a block, at the least and the most
_LEAST = 0.03  # of the time for a row: less is not worth a line
_T = 2.776  # Student's t for 5 pairs, 95 %
_CLOCK = {"cpu": "processor time"}


@dataclass(frozen=True)
class Way:
    """An override line that might make a run faster, and the disease that it would be against."""

    disease: str
    line: str


def speed(
    lines: Sequence[str],
    *,
    told: Callable[[str], None] | None = None,
    time_block: Callable[[Sequence[str], int, dict[str, Any]], Block] = block,
) -> Report:
    """Where the time of a step goes, and which overrides save some of it, each proved by paired blocks.

    told: called with what is being timed. time_block: times so many steps of a run. Raises InputError for lines that no
    run can be made of.
    """
    began, tell = time.perf_counter(), told or (lambda _: None)
    config, data = compose_config(list(lines)).config, dict[str, Any]()
    tell("the run as it is")
    first = time_block(lines, _STEPS[0], data)
    steps = int(min(_STEPS[1], max(_STEPS[0], _SECONDS * first.steps / max(first.wall, 1e-9))))
    found: list[Finding] = []
    tried: dict[str, dict[str, float]] = {}
    notes: list[str] = []
    base: list[Block] = []
    for way in ways(config):
        tell(way.line)
        try:
            pairs, saved = _proved(lambda turn, way=way: _pair(lines, way, steps, turn, data, time_block))
        except InputError as error:
            notes.append(f"{way.line} could not be tried: {error}")
            continue
        base += [plain for plain, _ in pairs]
        tried[way.line] = dict(zip(("saves", "low", "high"), saved, strict=True))
        if _holds(saved):
            found.append(_finding(way, *saved, pairs[0][0]))
    measured = {"step": _where(base or [first]), "tried": tried}
    sound = f"nothing found that makes a step faster by {_LEAST:.0%} and more than the noise"
    return Report(ordered(found), {"speed": measured}, time.perf_counter() - began, (_told(measured), *notes), sound)


def ways(config: Mapping[str, Any]) -> Iterator[Way]:
    """What is worth a trial for this config; each changes one thing."""
    if config.get("profile"):
        yield Way("slow_loop", "profile=false")
    if not config.get("lean", True):
        yield Way("slow_loop", "lean=true")
    yield Way("slow_layout", f"channels_last={str(not config.get('channels_last')).lower()}")
    precision = str(config["trainer"]["precision"])
    yield Way("slow_precision", "trainer.precision=" + ("bf16-mixed" if precision.startswith("32") else "32-true"))
    workers = config["data"].get("workers")
    if isinstance(workers, int):
        yield from (Way("slow_data", f"data.workers={count}") for count in {0, 2, 4} - {workers})
    size = config["data"].get("batch_size")
    if isinstance(size, int) and size < 512:
        yield Way("small_batches", f"data.batch_size={4 * size}")


def _pair(
    lines: Sequence[str], way: Way, steps: int, turn: int, data: dict[str, Any], time_block: Callable[..., Block]
) -> tuple[Block, Block]:
    """A block as it is and one with the override, every other turn the other way round."""
    order = [[*lines, way.line], list(lines)] if turn % 2 else [list(lines), [*lines, way.line]]
    timed = [time_block(arm, steps, data) for arm in order]
    plain, changed = timed[::-1] if turn % 2 else timed
    return plain, changed


Pairs = list[tuple[Block, Block]]
Saved = tuple[float, float, float]  # the share of a row's time, and its 95 % interval


def _proved(pair: Callable[[int], tuple[Block, Block]]) -> tuple[Pairs, Saved]:
    """Pairs and what they save. What the first promise others have to bear out: of many ways one is lucky."""
    pairs = [pair(turn) for turn in range(_PAIRS)]
    if _holds(_gain(pairs)):
        pairs = [pair(turn) for turn in range(_PAIRS)]
    return pairs, _gain(pairs)


def _holds(saved: Saved) -> bool:
    return saved[0] >= _LEAST and saved[1] > 0


def _gain(pairs: Sequence[tuple[Block, Block]]) -> Saved:
    """The share of a row's time that is saved, by the logarithms of the ratios."""
    logs = [math.log(changed.per_row / plain.per_row) for plain, changed in pairs]
    mean, half = statistics.fmean(logs), _T * statistics.stdev(logs) / math.sqrt(len(logs))
    return 1 - math.exp(mean), 1 - math.exp(mean + half), 1 - math.exp(mean - half)


def _finding(way: Way, gain: float, low: float, high: float, plain: Block) -> Finding:
    clock = _CLOCK.get(plain.device, "time")
    text = (
        f"{way.line} saves {gain:.0%} of the {clock} for a row (95 % interval {low:.0%} to {high:.0%}, {_PAIRS} pairs)"
    )
    return finding(way.disease, text, gain, overrides=((way.line,),))


def _where(blocks: Sequence[Block]) -> dict[str, float | str]:
    steps = sum(b.steps for b in blocks)
    wall, cpu, between = (sum(getattr(b, name) for b in blocks) for name in ("wall", "cpu", "between"))
    shares = {"ms": 1e3 * wall / steps, "cpu_ms": 1e3 * cpu / steps, "between": between / wall, "busy": cpu / wall}
    return {**{name: round(v, 4) for name, v in shares.items()}, "device": blocks[0].device}


def _told(measured: dict[str, Any]) -> str:
    step = measured["step"]
    return (
        f"a step takes {step['ms']:.2f} ms by the clock and {step['cpu_ms']:.2f} ms of the processor; "
        f"{step['between']:.0%} of it passes between steps, where batches are fetched and Python runs"
    )

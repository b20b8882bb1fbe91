"""The pictures of a report: effects with their intervals, learning curves with bands, accuracy against cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from knep.evidence.effects import Metric, Records, Row, median, tested
from knep.evidence.stats import interval
from knep.utils.pages import figure

_COLOURS = {"helps": "tab:green", "hurts": "tab:red"}


def _axes(width: float, height: float) -> tuple[Any, Any]:
    drawn = figure(width, height)
    return drawn, drawn.add_subplot()


def effects(rows: Sequence[Row], metric: Metric) -> Any:
    """A point with its 95 % interval per row, accuracy in points; colour by verdict."""
    drawn, axes = _axes(8, 1.2 + 0.32 * len(rows))
    for y, row in enumerate(reversed(rows)):
        e, colour = row.effect, _COLOURS.get(row.verdict.split(",")[0], "tab:gray")
        axes.plot([metric.scale * e.low, metric.scale * e.high], [y, y], color=colour, lw=2)
        axes.plot([metric.scale * e.mean], [y], "o", color=colour)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([_label(row) for row in reversed(rows)], parse_math=False)
    xlabel = f"effect on test {metric.said}, {metric.unit} (95 % interval)"
    axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel=xlabel)
    axes.grid(axis="x", alpha=0.3)
    return drawn


def _label(row: Row) -> str:
    return f"{row.slot}={row.option}" + ("" if row.kind == "choice" else f" ({row.kind})")


def curves(records: Records, metric: Metric, names: Sequence[str] | None = None) -> Any:
    """Validation metric by optimizer step: the mean of the seeds of each arm, and its 95 % interval as a band."""
    drawn, axes = _axes(8, 4.5)
    for name in names or list(records):
        bands = _band([r["curve"] for r in records[name].values() if r.get("curve")], metric)
        if not bands:
            continue
        steps, mean, low, high = zip(*bands, strict=True)
        (line,) = axes.plot(steps, mean, marker=".", label=name)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xlabel="optimizer steps", ylabel=_axis("validation", metric))
    axes.grid(alpha=0.3)
    low, high = axes.get_ylim()
    # A band of two seeds may be wider than what an accuracy can be.
    axes.set_ylim(max(low, 0), min(high, 100) if metric.mode == "max" else high)
    if axes.lines:
        axes.legend(fontsize=8, ncols=1 + len(axes.lines) // 12)
    return drawn


def _axis(split: str, metric: Metric) -> str:
    return f"{split} {metric.said}, {'%' if metric.mode == 'max' else metric.unit}"


def _band(curves: Sequence[Sequence[Mapping[str, float]]], metric: Metric) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high), shares in per cent, as far as all seeds went."""
    bands = []
    for points in zip(*curves, strict=False):
        values = [metric.scale * p[f"val/{metric.name}"] for p in points]
        low, high = interval(values) if len(values) > 1 else (values[0], values[0])
        bands.append((points[0]["step"], statistics.fmean(values), low, high))
    return bands


def cost(records: Records, metric: Metric) -> Any:
    """Mean test metric of each arm against its median processor time."""
    drawn, axes = _axes(8, 4.5)
    for name, by_seed in records.items():
        seconds = median(by_seed, "cpu_seconds")
        mean = metric.scale * statistics.fmean(tested(r, metric) for r in by_seed.values())
        axes.plot([seconds], [mean], "o", color="tab:blue")
        axes.annotate(name, (seconds, mean), xytext=(4, 4), textcoords="offset points", fontsize=7, parse_math=False)
    axes.set(xlabel="processor seconds of a run, median", ylabel=_axis("test", metric))
    axes.grid(alpha=0.3)
    return drawn


def isolation(points: Mapping[str, Sequence[Any]], spaces: Mapping[str, Mapping[str, Any]]) -> Any:
    """A row per arm and a column per parameter: mean validation loss of every point that was tried against its value.

    The edges of a plot are those of the search space: a best point at one of them asks for a wider space.
    """
    columns = max(map(len, spaces.values()))
    drawn = figure(3.2 * columns, 2.3 * len(points))
    grid = drawn.subplots(len(points), columns, squeeze=False, sharey=True)
    for row, (name, tried) in zip(grid, points.items(), strict=True):
        for axes, (key, ends) in zip(row, spaces[name].items(), strict=False):
            axes.plot([p.values[key] for p in tried], [p.value for p in tried], "o", ms=4)
            axes.set(yscale="log", xscale="log" if ends.log else "linear", xlim=(ends.low, ends.high), xlabel=key)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{name}\nvalidation loss", parse_math=False)
        for axes in row[len(spaces[name]) :]:
            axes.axis("off")
    return drawn


def profile(factors: Sequence[float], shares: Mapping[str, Sequence[float]]) -> Any:
    """Share of the workloads that an arm solves within a factor of the fastest arm's time (Dahl et al. 2023)."""
    drawn, axes = _axes(8, 4)
    for name, values in shares.items():
        axes.step(factors, values, where="post", label=name)
    axes.set(xlabel="factor of the fastest arm's processor time to the target", ylabel="share of workloads solved")
    axes.set_ylim(-0.05, 1.05)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return drawn


def signal(found: Mapping[str, Mapping[str, Any]]) -> Any:
    """group -> arm -> Signal: a row per group, forward at the left, backward at the right, logarithmic."""
    drawn = figure(9, 2.8 * len(found))
    for row, (group, arms) in zip(drawn.subplots(len(found), 2, squeeze=False), found.items(), strict=True):
        for axes, part in zip(row, ("forward", "backward"), strict=True):
            for name, one in arms.items():
                values = getattr(one, part)
                axes.plot(range(1, len(values) + 1), values, label=name)
            axes.set(yscale="log", title=f"{part} {group}", xlabel="layer", ylabel="standard deviation")
            axes.grid(alpha=0.3)
        row[0].legend(fontsize=7)
    return drawn

"""The pictures of an examination, from what was measured, each with the healthy band drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from knep.utils.pages import figure

_HEALTHY = "#2e7d3226"  # the band; lines over it stay readable
_LINE, _SECOND = "#1f4e8c", "#b3541e"
_UPDATES = (1e-4, 3e-2)  # ||dw|| / ||w|| of a step
_SIGNAL = (0.1, 10.0)  # deviation of a layer's output
_GRADIENTS = (1e-2, 1e2)  # of a layer, over that of the head
_DEAD, _SATURATED = 0.5, 0.5  # shares
_MOST_NAMES = 40


def figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> matplotlib Figure of what `measured` holds; what is missing leaves its figure out.

    measured: "signals" = {"layers": [{path, kind, mean, std, dead, saturated, similarity, grad_std}], "weights":
    [{path, grad_norm, weight_norm}]}; "trial" = {"losses", "accs", "updates": [[step, ratio]], "norms", "curve":
    [[step, loss, accuracy]]}; "range" = {"rates", "losses"}. Numbers that are not finite are left out.
    """
    signals, trial = measured.get("signals") or {}, measured.get("trial") or {}
    layers, weights = signals.get("layers") or [], signals.get("weights") or []
    drawn: dict[str, Callable[[], Any]] = {}
    if layers:
        drawn["signal propagation"] = lambda: signal_figure(layers)
        drawn["dead and saturated units"] = lambda: shares_figure(layers)
    if any(w.get("grad_norm") for w in weights):
        drawn["gradient by depth"] = lambda: gradient_figure(weights)
    if trial.get("updates"):
        drawn["update to weight"] = lambda: updates_figure(trial["updates"])
    if trial.get("losses"):
        drawn["loss"] = lambda: loss_figure(trial["losses"], trial.get("curve") or [])
    span = measured.get("range") or {}
    if span.get("rates") and span.get("losses"):
        drawn["learning rate range"] = lambda: range_figure(span["rates"], span["losses"])
    made = {name: draw() for name, draw in drawn.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def _axes(rows: int = 1, width: float = 8.0, height: float = 3.4) -> tuple[Any, list[Any]]:
    drawn = figure(width, height * rows)
    axes = [drawn.add_subplot(rows, 1, i + 1) for i in range(rows)]
    for a in axes:
        a.grid(alpha=0.25)
        a.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def _band(axes: Any, low: float, high: float, text: str = "healthy") -> None:
    axes.axhspan(low, high, color=_HEALTHY, lw=0, label=text)


def _names(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Layer names under the axis, as many as can be read."""
    every = max(1, -(-len(rows) // _MOST_NAMES))
    axes.set_xticks(range(0, len(rows), every))
    labels = [f"{row['path']} {row.get('kind', '')}".strip()[-34:] for row in rows[::every]]
    axes.set_xticklabels(labels, rotation=60, ha="right", fontsize=7, parse_math=False)


def _points(values: Sequence[Any], positive: bool = False) -> tuple[list[int], list[float]]:
    """Positions and values of the numbers that can be drawn; positive: on a logarithmic axis."""
    kept = [(i, float(v)) for i, v in enumerate(values) if v is not None and math.isfinite(v)]
    kept = [(i, v) for i, v in kept if v > 0] if positive else kept
    return [i for i, _ in kept], [v for _, v in kept]


def signal_figure(layers: Sequence[Mapping[str, Any]]) -> Any:
    """Mean and deviation of each layer's output, and the deviation of its gradient, in the order of the forward."""
    figure, (forward, backward) = _axes(2)
    _band(forward, *_SIGNAL)
    forward.plot(
        *_points([row.get("std") for row in layers], positive=True), "o-", color=_LINE, ms=4, label="deviation"
    )
    forward.plot(
        *_points([abs(row.get("mean", math.nan)) for row in layers], positive=True),
        ".--",
        color=_SECOND,
        label="|mean|",
    )
    forward.set(yscale="log", ylabel="output", xticklabels=[], xticks=range(len(layers)), title="forward")
    xs, ys = _points([row.get("grad_std") for row in layers], positive=True)
    if ys:
        _band(backward, ys[-1] * _GRADIENTS[0], ys[-1] * _GRADIENTS[1])
    backward.plot(xs, ys, "o-", color=_LINE, ms=4, label="deviation")
    backward.set(yscale="log", ylabel="gradient of the output", title="backward")
    _names(backward, layers)
    for axes in (forward, backward):
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.legend(fontsize=8, loc="best")
    return figure


def shares_figure(layers: Sequence[Mapping[str, Any]]) -> Any:
    """The share of dead units and of saturated values of each nonlinearity; None where there is neither."""
    rows = [row for row in layers if row.get("dead") is not None or row.get("saturated") is not None]
    if not rows:
        return None
    figure, (axes,) = _axes(height=3.8)
    _band(axes, 0, _DEAD)
    for name, colour in (("dead", _LINE), ("saturated", _SECOND)):
        xs, ys = _points([row.get(name) for row in rows])
        if ys:
            axes.vlines(xs, 0, ys, color=colour, lw=3)
            axes.plot(xs, ys, "o", color=colour, ms=6, label=name)
    axes.set(ylim=(-0.03, 1), ylabel="share", xlim=(-0.6, len(rows) - 0.4))
    _names(axes, rows)
    axes.legend(fontsize=8)
    return figure


def gradient_figure(weights: Sequence[Mapping[str, Any]]) -> Any:
    """||gradient|| / ||weight|| of each weight, from the input to the head, against that of the head."""
    figure, (axes,) = _axes(height=4.2)
    ratios = [_over(row.get("grad_norm"), row.get("weight_norm")) for row in weights]
    xs, ys = _points(ratios, positive=True)
    if not ys:
        return None
    _band(axes, ys[-1] * _GRADIENTS[0], ys[-1] * _GRADIENTS[1], "healthy, around the head's")
    axes.plot(xs, ys, "o-", color=_LINE, ms=4, label="||gradient|| / ||weight||")
    axes.set(yscale="log", xlim=(-0.5, len(weights) - 0.5))
    _names(axes, weights)
    axes.legend(fontsize=8)
    return figure


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def updates_figure(updates: Sequence[Sequence[float]]) -> Any:
    """||dw|| / ||w|| by step, the median over weights."""
    figure, (axes,) = _axes()
    _band(axes, *_UPDATES)
    kept = [(step, ratio) for step, ratio in updates if math.isfinite(ratio) and ratio > 0]
    axes.plot([s for s, _ in kept], [r for _, r in kept], "o-", color=_LINE, ms=4, label="||change|| / ||weight||")
    axes.set(yscale="log", xlabel="step")
    axes.legend(fontsize=8)
    return figure


def loss_figure(losses: Sequence[float], curve: Sequence[Sequence[float]]) -> Any:
    """Training loss by step, with its running median, and validation loss; healthy: not above the start."""
    figure, (axes,) = _axes()
    xs, ys = _points(losses)
    if not ys:
        return None
    _band(axes, 0, ys[0], "healthy: below the start")
    axes.plot(xs, ys, color=_LINE, lw=0.6, alpha=0.5, label="training, by batch")
    smooth = list(_smoothed(ys))
    axes.plot(xs, smooth, color=_LINE, lw=1.8, label="training, smoothed")
    kept = [(row[0], row[1]) for row in curve if math.isfinite(row[1])]
    if kept:
        axes.plot([s for s, _ in kept], [v for _, v in kept], "s--", color=_SECOND, ms=4, label="validation")
    top = max([1.2 * ys[0], *(1.1 * v for v in smooth)])
    axes.set(xlabel="step", ylabel="loss", ylim=(0, min(top, 20 * max(ys[0], 1e-6))))
    axes.legend(fontsize=8)
    return figure


def _smoothed(values: Sequence[float]) -> Iterator[float]:
    average = values[0]
    for value in values:
        average = 0.9 * average + 0.1 * value
        yield average


def range_figure(rates: Sequence[float], losses: Sequence[float]) -> Any:
    """The loss while the learning rate is raised step by step (Smith 2017, sec. 3.3); healthy: where it falls."""
    figure, (axes,) = _axes()
    kept = [(r, v) for r, v in zip(rates, losses, strict=False) if math.isfinite(v) and r > 0]
    if len(kept) < 2:
        return None
    smooth = list(_smoothed([v for _, v in kept]))
    low = min(range(len(smooth)), key=lambda i: smooth[i])
    start = next((i for i, v in enumerate(smooth) if v < smooth[0] - 0.1 * (smooth[0] - smooth[low])), 0)
    if low > start:
        axes.axvspan(kept[start][0], kept[low][0], color=_HEALTHY, lw=0, label="healthy: the loss falls")
    axes.plot([r for r, _ in kept], [v for _, v in kept], color=_LINE, lw=0.6, alpha=0.5)
    axes.plot([r for r, _ in kept], smooth, color=_LINE, lw=1.8, label="loss, smoothed")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(0, 2 * smooth[0]))
    axes.legend(fontsize=8)
    return figure

"""What the signals of a whole network come down to, and where these numbers lie in networks that were seen to learn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from knep.observe.rows import Layer, Signals

_HEALTHY = Path(__file__).with_name("healthy.json")
_LOWEST = -45.0  # log10 of what float32 holds


def marks(seen: Signals) -> dict[str, float]:
    """Name -> number; those that the network has no layers for are left out.

    backward, forward: log10 of the gradient's norm at the first layer with weights over that at the last, and of the
    signal between images at the last over that at the first; backward_layer, forward_layer: the same per layer
    between; size: log10 of the size of the last signal over the first; spread: of the last hidden signal, log10;
    dead, saturated: the worst layer's share; scores: log10 of the scores' standard deviation; loss: over chance;
    gradient: log10 of the norm of all gradients; ratio: log10 of the largest gradient/weight of a matrix.
    """
    found: dict[str, float] = {}
    if seen.scores.chance:  # outputs of other tasks, and their losses, have units of their own
        found |= {"scores": log(seen.scores.std), "gradient": log(seen.gradient_norm)}
        found["loss"] = seen.scores.loss / seen.scores.chance
    rows = between(seen)
    if len(rows) > 1:
        first, last, steps = rows[0], rows[-1], len(rows) - 1
        found |= {"forward": log(last.signal) - log(first.signal), "size": log(last.size) - log(first.size)}
        found["forward_layer"] = found["forward"] / steps
        found["spread"] = log(last.spread)
    flows = [layer.flow for layer in seen.linear if layer.flow]  # exactly zero: cut off or dead, not shrunk
    if len(flows) > 1:
        found["backward"] = log(flows[0]) - log(flows[-1])
        found["backward_layer"] = found["backward"] / (len(flows) - 1)
    hidden = hidden_bends(seen)
    if dead := [layer.dead for layer in hidden if layer.dead is not None]:
        found["dead"] = max(dead)
    if saturated := [layer.saturated for layer in hidden if layer.saturated is not None]:
        found["saturated"] = max(saturated)
    if ratios := [w.ratio for w in seen.weights if w.ndim > 1 and w.ratio is not None]:
        found["ratio"] = log(max(ratios))
    return found


def log(value: float) -> float:
    """log10, with an end below."""
    return math.log10(value) if value > 10**_LOWEST else _LOWEST


def between(seen: Signals) -> list[Layer]:
    """Layers with weights, without those at the end whose weights are zero as yet."""
    rows = seen.linear
    while rows and rows[-1].scale == 0:
        rows = rows[:-1]
    return rows


def hidden_bends(seen: Signals) -> list[Layer]:
    """Activations that a layer with weights comes after."""
    last = max((i for i, layer in enumerate(seen.layers) if layer.weighted), default=0)
    return [layer for layer in seen.layers[:last] if layer.dead is not None or layer.saturated is not None]


@lru_cache
def healthy() -> Mapping[str, tuple[float, ...]]:
    """Name of a mark -> its values in networks that were seen to learn, sorted."""
    table = json.loads(_HEALTHY.read_text(encoding="utf-8"))
    return {name: tuple(values) for name, values in table["marks"].items()}


def quantile(name: str, q: float) -> float:
    """Of a mark's healthy values; q in [0, 1]."""
    values = healthy()[name]
    return values[round(q * (len(values) - 1))]


def below(name: str, found: Mapping[str, float], q: float = 0.01) -> float:
    """How far a mark lies below the q-quantile of healthy networks; 0 where it does not, or there is none."""
    return max(0.0, quantile(name, q) - found[name]) if name in found else 0.0


def above(name: str, found: Mapping[str, float], q: float = 0.99) -> float:
    """How far a mark lies above the q-quantile of healthy networks; 0 where it does not, or there is none."""
    return max(0.0, found[name] - quantile(name, q)) if name in found else 0.0

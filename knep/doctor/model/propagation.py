"""Signals and gradients on their way through the layers, beside networks that were seen to learn.

Mean-field theory (Poole et al. 2016, Schoenholz et al. 2017) says that each layer multiplies what tells two images
apart, and the gradient on its way back, by a factor of its weights' variance and its activation's slope; He et al. 2015
choose the weights so that it is 1. So a mark counts by its factor per layer and by what that comes to over all layers.
"""

from __future__ import annotations

import math
from dataclasses import replace

from knep.doctor.findings import Finding, finding, named, share
from knep.doctor.model.healthy_ranges import above as over
from knep.doctor.model.healthy_ranges import below as under
from knep.doctor.model.healthy_ranges import between, hidden_bends, marks, quantile
from knep.observe.rows import Layer, Signals

_DEAD, _SATURATED = 0.95, 0.6  # share of a layer's units, of its numbers, that leaves it nothing to do
_DEEP, _FADED = 20, 0.4  # layers with weights over which the images of a plain network come to look alike by degrees
_PLAIN = 0.4  # root mean square of a last hidden signal that has not shrunk


def propagation(seen: Signals) -> list[Finding]:
    """dying_relu, saturation, exploding_gradient, vanishing_gradient and signal_collapse, cause before symptom."""
    found = marks(seen)
    bends = [*_dying(seen), *_saturated(seen)]
    blocked = max((f.gravity for f in bends if f.certain), default=0.0)
    return [*bends, *_exploding(seen, found, blocked), *_shrinking(seen, found, blocked)]


def _dying(seen: Signals) -> list[Finding]:
    if any(layer.scale == 0 for layer in seen.linear[:-1]):
        return []  # weights of zero are the cause
    relus = [layer for layer in hidden_bends(seen) if layer.dead is not None and layer.units > 1]
    worst = max(relus, key=lambda layer: layer.dead or 0.0, default=None)
    if worst is None or worst.dead is None:
        return []
    # Where all images are the same, a unit is dead with probability 1/2, which is not why.
    if worst.dead <= _outside("dead", 0.75 if worst.spread < 0.2 else 0.6):
        return []
    dead = [layer for layer in relus if layer.dead and layer.dead > 0.5 * worst.dead]
    certain = worst.dead >= _DEAD and (len(dead) >= 0.5 * len(relus) or _same(seen))
    text = f"{share(worst.dead)} of the {worst.units} units of {worst.path} are zero for all {seen.images} images"
    if len(dead) > 1:
        text += f", and more than half as many in {named([layer.path for layer in dead])}"
    gravity = 0.97 if certain else 0.5 + 0.4 * worst.dead
    return [finding("dying_relu", text, gravity, certain=certain, layers=[layer.path for layer in dead])]


def _saturated(seen: Signals) -> list[Finding]:
    bends = [layer for layer in hidden_bends(seen) if layer.saturated is not None]
    worst = max(bends, key=lambda layer: layer.saturated or 0.0, default=None)
    if worst is None or worst.saturated is None or worst.saturated <= _outside("saturated", 0.25):
        return []
    flat = [layer for layer in bends if (layer.saturated or 0.0) > 0.5 * worst.saturated]
    certain = worst.saturated >= _SATURATED and len(flat) >= 0.5 * len(bends)
    text = (
        f"{share(worst.saturated)} of the numbers of {worst.path} ({worst.function}) lie where the slope is below "
        f"5% of the largest"
    )
    if len(flat) > 1:
        text += f", and more than half as many in {named([layer.path for layer in flat])}"
    gravity = 0.93 if certain else 0.5 + 0.4 * worst.saturated
    return [finding("saturation", text, gravity, certain=certain, layers=[layer.path for layer in flat])]


def _outside(name: str, least: float) -> float:
    """A share that no network which learned went over, and `least` at the least."""
    return max(least, quantile(name, 0.99))


def _same(seen: Signals) -> bool:
    """Whether scores do not depend on the image."""
    rows = between(seen)
    return bool(rows) and rows[-1].spread < 1e-4


def _exploding(seen: Signals, found: dict[str, float], blocked: float) -> list[Finding]:
    if not seen.finite:
        bad = next((layer.path for layer in seen.layers if layer.finite < 1), "the loss")
        text = f"the first pass gives numbers that are not finite, first in {bad}"
        return [finding("exploding_gradient", text, 1.0, layers=[bad])]
    grown = min(over("backward", found, 0.9), 10 * over("backward_layer", found, 0.9))
    far = max(
        grown / 2,  # in decades
        math.log10(max(1.0, found.get("loss", 0.0) / quantile("loss", 0.99))),
        over("scores", found) * 0.7,
        over("gradient", found) * 0.5,
    )
    if far <= 0:
        return []
    rows = [layer for layer in seen.linear if layer.flow]
    large = [w.path for w in between(seen) if w.size > 10 * max(1.0, seen.input_std)] or [r.path for r in rows[:1]]
    text = f"the outputs have deviation {seen.scores.std:.3g} and the loss is {seen.scores.loss:.3g}"
    if "loss" in found:
        text = (
            f"the scores have deviation {seen.scores.std:.3g} and the loss is {found['loss']:.3g} times that of chance"
        )
    text += f"; the gradient of all weights has norm {seen.gradient_norm:.3g}"
    if len(rows) > 1 and rows[-1].flow:
        text += f", that at {rows[0].path} is {_times(10 ** found['backward'])} that at {rows[-1].path}"
    certain = far > 0.7
    gravity = 0.92 if certain else 0.45 + 0.4 * far
    gravity = min(gravity, 0.6) if blocked else gravity
    return [finding("exploding_gradient", text, gravity, certain=certain, layers=large)]


def _shrinking(seen: Signals, found: dict[str, float], blocked: float) -> list[Finding]:
    """vanishing_gradient where layers shrink what passes, signal_collapse where it stays large but says nothing."""
    collapsed = _collapses(seen, found)
    first = _vanishes(seen, found)
    whole = between(seen)
    hidden = whole[-2] if len(whole) > 1 else None
    large = hidden is not None and hidden.size >= _PLAIN and not _sigmoids(seen)
    ranked = [f for f in ((collapsed, first) if large else (first, collapsed)) if f is not None]
    blame = 0.6 if blocked else 1.0
    return [replace(f, gravity=f.gravity * blame * factor) for f, factor in zip(ranked, (1.0, 0.7), strict=False)]


def _sigmoids(seen: Signals) -> bool:
    """Whose outputs share a mean of 1/2, so that images look alike in every sound network of them."""
    return any(layer.function in ("sigmoid", "hardsigmoid") for layer in hidden_bends(seen))


def _vanishes(seen: Signals, found: dict[str, float]) -> Finding | None:
    far = max(under("backward", found, 0.05), 2 * min(1.0, under("backward_layer", found, 0.02)))
    weak = under("ratio", found) + under("scores", found)
    if far <= 0 and weak <= 0:
        return None
    rows = [layer for layer in seen.linear if layer.flow]
    if len(rows) < 2:
        return None
    text = (
        f"the gradient's norm at {rows[0].path} is {_times(10 ** found['backward'])} that at {rows[-1].path}, a factor "
        f"{10 ** found['backward_layer']:.2g} for each of {len(rows) - 1} layers; the signal changes by "
        f"{10 ** found.get('forward_layer', 0.0):.2g} per layer on its way forward{_drawn(seen)}"
    )
    small = under("backward", found, 0.05) > 0 and under("backward_layer", found) > 0.4
    certain = small or under("backward", found) > 2
    gravity = 0.9 if certain else min(0.85, 0.5 + 0.2 * (far + weak))
    return finding("vanishing_gradient", text, gravity, certain=certain, layers=[r.path for r in rows[:-1]])


def _drawn(seen: Signals) -> str:
    """What the weights multiply by, where that is far from 1."""
    scales = sorted(layer.scale for layer in seen.linear[:-1] if layer.scale is not None)
    middle = scales[len(scales) // 2] if scales else 1.0
    return f", by weights of deviation x sqrt(inputs) = {middle:.2g}" if not 0.5 < middle < 2 else ""


def _collapses(seen: Signals, found: dict[str, float]) -> Finding | None:
    far = under("spread", found, 0.05)
    rows = between(seen)
    deep = len(rows) >= _DEEP and rows[-1].spread < _FADED * rows[0].spread and rows[-1].cosine > 0.9
    if (far <= 0 and not deep) or len(rows) < 2:
        return None
    last = rows[-1]
    sure = under("spread", found) > (1.5 if _sigmoids(seen) else 0.5)
    text = (
        f"between images the scores of {last.path} deviate by {last.spread:.2g} of their size, those of {rows[0].path} "
        f"by {rows[0].spread:.2g}; two images' outputs have cosine {_cosine(last)}"
    )
    return finding(
        "signal_collapse",
        text,
        0.92 if sure else min(0.85, 0.55 + 0.2 * far),
        certain=sure,
        layers=[row.path for row in rows if row.spread < 0.1 * rows[0].spread],
    )


def _cosine(layer: Layer) -> str:
    return f"{layer.cosine:.4f}" if layer.cosine < 0.9999 else f"1 - {max(0.0, 1 - layer.cosine):.1g}"


def _times(factor: float) -> str:
    return f"{factor:.2g} of" if factor < 1 else f"{factor:.3g} times"

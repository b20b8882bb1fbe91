"""What the images alone show: not finite, all the same, far from mean 0 and deviation 1."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

from torch import Tensor

from knep.doctor.data.first_layer import Entrance
from knep.doctor.data.split_view import Split
from knep.doctor.findings import Finding, finding, row

# Root of the mean square of what the first layer sees. Sound scalings of sound images: 0.28 (Fashion-MNIST / 255: 0.45,
# digits / 16: 0.49, MNIST / 255: 0.33) to 1.1 (standardised); raw bytes: 85 to 150.
_SUSPECT, _CERTAIN = (0.1, 3.0), (0.01, 20.0)
_SHIFT = 4.0  # |mean| over deviation; sound images in [0, 1] stay below 3.5


def input_findings(train: Split, val: Split | None, door: Entrance) -> list[Finding]:
    found = broken_findings(train, val)
    if not len(train):
        return found
    same = constant_findings(train)
    return found + same + ([] if any(f.certain for f in same) else scale_findings(train, door))


def broken_findings(train: Split, val: Split | None) -> list[Finding]:
    """Images that hold NaN or infinity, by batch and place."""
    found = []
    for name, part in (("training", train), ("validation", val)):
        if part is None or not part.broken:
            continue
        where = ", ".join(f"batch {b} image {i}" for b, i in part.broken[:6])
        text = f"{len(part.broken)} of {len(part.y)} {name} images hold NaN or infinity: {where}"
        text += ", ..." if len(part.broken) > 6 else ""
        found.append(finding("non_finite_inputs", text, 1.0 if name == "training" else 0.9))
    return found


def variety(part: Split) -> dict[str, float]:
    """How far images differ: `between`, the variance over images of a pixel over that of all pixels; `size`, the root
    of the mean square; `distinct`, distinct raw images over images; `blank`, share of images of one single value;
    `torn`, share of images that equal an image with another label.
    """
    x = part.flat.double()
    size = float(x.square().mean())
    total = float(part.small.double().var((0, 2, 3), correction=0).mean())
    labels = defaultdict(Counter)
    for key, y in zip(part.key, part.y.tolist(), strict=True):
        labels[key][y] += 1
    torn = sum(sum(c.values()) for c in labels.values() if len(c) > 1)
    return {
        "between": float(x.var(0, correction=0).mean()) / total if total > 0 else 0.0,
        "variation": math.sqrt(float(x.var(0, correction=0).mean()) / size) if size > 0 else 0.0,
        "size": math.sqrt(size),
        "distinct": len(labels) / len(part.key),
        "blank": float((part.std.amax(1) <= 1e-6 * part.largest.clamp_min(1e-30)).double().mean()),
        "torn": torn / len(part.key),
    }


def constant_findings(train: Split) -> list[Finding]:
    """All images the same, or nearly, or few distinct ones under many labels, or blank ones."""
    count, v = len(train.key), variety(train)
    if count < 2:
        return []
    distinct = round(v["distinct"] * count)
    if distinct == 1 or v["variation"] < 1e-5:
        text = f"{count} training images differ by {v['variation']:.2g} of their size; {distinct} of them are distinct"
        return [finding("constant_inputs", text, 1.0, certain=count >= 4)]
    if v["torn"] > 0.5 and count >= 20:
        text = f"{100 * v['torn']:.3g} % of {count} training images equal another image with another label; "
        return [finding("constant_inputs", text + f"{distinct} images are distinct", 0.95)]
    if v["blank"] > 0.1 and train.small[0].numel() > 1:
        text = f"{100 * v['blank']:.3g} % of the training images have one value in all their pixels"
        return [finding("constant_inputs", text, min(0.95, 0.4 + v["blank"] / 2), certain=v["blank"] > 0.5)]
    if v["between"] < 0.01 or v["variation"] < 0.01 or (v["distinct"] < 0.05 and count >= 200):
        text = f"{count} training images, {distinct} of them distinct, differ in {100 * v['between']:.3g} % of the "
        text += f"variance of their pixels, and by {100 * v['variation']:.3g} % of their size"
        return [finding("constant_inputs", text, 0.7, certain=v["between"] < 1e-4)]
    return []


def scale_findings(train: Split, door: Entrance) -> list[Finding]:
    """What the first layer with weights sees, channel by channel, far from mean 0 and deviation 1."""
    if door.tokens:
        return []
    mean, std, largest = seen_scale(train, door)
    size = (mean.square() + std.square()).sqrt()
    if float(size.max()) == 0:
        return []
    text = f"{door.layer or 'the model'} sees mean {row(mean)}, deviation {row(std)}, largest {largest:.3g}"
    big, small, uneven = float(size.max()), float(size.max()), _uneven(std)
    shift = float((mean.abs() / std.clamp_min(1e-12))[std > 0].max()) if bool((std > 0).any()) else 0.0
    why = []
    if big > _SUSPECT[1] or small < _SUSPECT[0]:
        why.append(f"its size is {big:.3g}, where 1 is right")
    if shift > _SHIFT:
        why.append(f"the mean is {shift:.3g} deviations from 0")
    if uneven > 10:
        why.append(f"one channel is {uneven:.3g} times as wide as another")
    if not why:
        return []
    far = (big > _CERTAIN[1] or small < _CERTAIN[0]) and not door.normalises
    gravity = min(0.9, 0.4 + 0.25 * abs(math.log10(big))) if far else 0.3 if door.normalises else 0.45
    if door.normalises:
        why.append("the model normalises it at once")
    layers = (door.layer,) if door.layer else ()
    return [finding("unscaled_inputs", f"{text}: {', '.join(why)}", gravity, certain=far, layers=layers)]


def seen_scale(train: Split, door: Entrance) -> tuple[Tensor, Tensor, float]:
    """Mean and deviation (C,) over images and pixels, and the largest |x|, of what the first layer gets."""
    if door.own and door.x is not None and door.x.ndim > 1:
        x = door.x.double()
        rows = x.transpose(0, 1).flatten(1) if x.ndim == 4 else x.flatten()[None]
        return rows.mean(1), rows.std(1, correction=0), float(x.abs().max())
    mean = train.mean.mean(0)
    square = (train.mean.square() + train.std.square()).mean(0)
    return mean, (square - mean.square()).clamp_min(0).sqrt(), float(train.largest.max())


def _uneven(std: Tensor) -> float:
    wide = std[std > 0]
    return float(wide.max() / wide.min()) if len(wide) > 1 else 1.0


def inputs_seen(train: Split, door: Entrance) -> dict[str, Any]:
    """Plain data: what the first layer sees by channel, and how far images differ."""
    if not len(train):
        return {"finite": 0}
    mean, std, largest = seen_scale(train, door)
    scale = {"mean": mean.tolist(), "std": std.tolist(), "largest": largest, "normalises": door.normalises}
    return {"finite": len(train), "layer": door.layer, **scale, **variety(train)}

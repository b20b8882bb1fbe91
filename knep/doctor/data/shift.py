"""Validation images unlike training images: other mean or deviation, inverted, turned, channels in another order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.doctor.data.split_view import Split
from knep.doctor.findings import Finding, finding, row

_CELLS = 8  # of a side of the mean images that are compared
_FAR_SHIFT, _FAR_RATIO = 0.7, 1.8  # certain
_SHIFT, _RATIO = 0.12, 1.15  # suspect; erasing and shifts of the training loader stay below 0.1 and 1.1
_ERRORS = 6.0  # standard errors
_MISFIT = 10.0  # mean squared error of a mean image, in squared standard errors
# Layouts in which images may have been given by mistake, with what undoes each.
_LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "inverted (dark for bright)": lambda x: -x,
    "with the channels in reverse order (BGR for RGB)": lambda x: x.flip(1),
    "transposed": lambda x: x.transpose(2, 3),
    "upside down": lambda x: x.flip(2),
    "mirrored": lambda x: x.flip(3),
    "turned by 180 degrees": lambda x: x.flip(2, 3),
    "turned by 90 degrees to the left": lambda x: x.rot90(-1, (2, 3)),
    "turned by 90 degrees to the right": lambda x: x.rot90(1, (2, 3)),
}


@dataclass(frozen=True)
class Drift:
    """By channel, float64 (C,): mean and deviation of training's pixels (of the classes that validation has, in its
    shares) and of validation's; shift, the difference of means in training's deviations; ratio, of deviations;
    shift_errors, ratio_errors: both in standard errors. fits: how badly the mean image of validation fits that of
    training, in squared standard errors (1 is chance), as it is ("") and after undoing each layout that is possible.
    """

    train_mean: Tensor
    train_std: Tensor
    val_mean: Tensor
    val_std: Tensor
    shift: Tensor
    ratio: Tensor
    shift_errors: Tensor
    ratio_errors: Tensor
    fits: dict[str, float]


def drift(train: Split, val: Split) -> Drift | None:
    """None where a split has fewer than 10 finite images of a common class, or the shapes differ."""
    w, v = _weights(train, val)
    if (w > 0).sum() < 10 or v.sum() < 10 or train.small.shape[1:] != val.small.shape[1:]:
        return None
    mean, std, mean_error, square_error = _pixels(train.mean, train.std, w)
    val_mean, val_std, val_mean_error, val_square_error = _pixels(val.mean, val.std, v / v.sum())
    tiny = 1e-6 * (mean.abs() + 1e-12)
    shift = (val_mean - mean) / std.clamp_min(tiny)
    ratio = val_std.clamp_min(tiny) / std.clamp_min(tiny)
    return Drift(
        mean,
        std,
        val_mean,
        val_std,
        shift,
        ratio,
        (val_mean - mean).abs() / (mean_error.square() + val_mean_error.square()).sqrt().clamp_min(tiny),
        (val_std.square() - std.square()).abs()
        / (square_error.square() + val_square_error.square()).sqrt().clamp_min(tiny.square()),
        _fits(train.small, val.small, w, v / v.sum()),
    )


def _weights(train: Split, val: Split) -> tuple[Tensor, Tensor]:
    """Weights (n,) of training images by the share of their class in validation, and which validation images count."""
    classes = int(max(train.labels.max(), val.labels.max(), 0)) + 1
    if min(int(train.labels.min()), int(val.labels.min())) < 0 or classes > 100_000:
        return torch.full((len(train),), 1 / len(train)).double(), torch.ones(len(val)).double()
    here, there = (torch.bincount(part.labels, minlength=classes).double() for part in (train, val))
    if float(there[here > 0].sum()) < 0.5 * len(val):
        return torch.full((len(train),), 1 / len(train)).double(), torch.ones(len(val)).double()
    w = (there / here.clamp_min(1))[train.labels]
    return w / w.sum(), (here[val.labels] > 0).double()


def _pixels(mean: Tensor, std: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Mean and deviation of all pixels by channel, and the standard errors of the mean and of the squared deviation."""
    w = w[:, None]
    centre = (w * mean).sum(0)
    square = std.square() + (mean - centre).square()
    variance = (w * square).sum(0)
    few = float(w.square().sum())  # one over the effective number of images
    error = (few * (w * (mean - centre).square()).sum(0)).sqrt()
    return centre, variance.sqrt(), error, (few * (w * (square - variance).square()).sum(0)).sqrt()


def _fits(x: Tensor, v: Tensor, w: Tensor, u: Tensor) -> dict[str, float]:
    centre, error = _mean_image(x, w)
    theirs, their_error = _mean_image(v, u)
    fits = {"": _misfit(centre, error, theirs, their_error)}
    for name, other in undone(theirs).items():
        fits[name] = _misfit(centre, error, other, _LAYOUTS[name](their_error).abs())
    return fits


def undone(x: Tensor) -> dict[str, Tensor]:
    """Images (N, C, H, W) of mean 0 taken back from each layout that would show in them: name -> (N, C, H, W)."""
    taken = {name: undo(x) for name, undo in _LAYOUTS.items()}
    return {name: y for name, y in taken.items() if y.shape == x.shape and not torch.equal(y, x)}


def _mean_image(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The mean image (1, C, h, w) and its standard error, in deviations of all pixels and from their mean."""
    cells = F.adaptive_avg_pool2d(x, (min(x.shape[2], _CELLS), min(x.shape[3], _CELLS))).double()
    whole = w[:, None, None, None]
    pixels = (whole * x.double()).sum(0).mean()
    scale = ((whole * (x.double() - pixels).square()).sum(0).mean()).sqrt().clamp_min(1e-12)
    cells = (cells - pixels) / scale
    mean = (whole * cells).sum(0, keepdim=True)
    spread = (whole * (cells - mean).square()).sum(0, keepdim=True)
    return mean, (spread * w.square().sum()).sqrt()


def _misfit(a: Tensor, a_error: Tensor, b: Tensor, b_error: Tensor) -> float:
    # Cells that hardly vary, such as black borders, get the error of a twentieth of a deviation.
    error = a_error.square() + b_error.square()
    floor = (0.05 * error.mean()).clamp_min(1e-12)
    return float(((a - b).square() / (error + floor)).mean())


def drift_findings(d: Drift | None, images: int) -> list[Finding]:
    """images: of validation that were looked at."""
    if d is None:
        return []
    far = (d.shift.abs() > _FAR_SHIFT) | (d.ratio > _FAR_RATIO) | (d.ratio < 1 / _FAR_RATIO)
    off = (d.shift.abs() > _SHIFT) & (d.shift_errors > _ERRORS)
    off |= ((d.ratio > _RATIO) | (d.ratio < 1 / _RATIO)) & (d.ratio_errors > _ERRORS)
    text = f"validation images have mean {row(d.val_mean)} and deviation {row(d.val_std)}, training images "
    text += f"{row(d.train_mean)} and {row(d.train_std)}"
    layout = min(d.fits, key=lambda name: d.fits[name])
    before, after = d.fits[""], d.fits[layout]
    if layout and before > _MISFIT and after < before / 5:
        text += (
            f". Their mean image fits that of training {math.sqrt(before / after):.3g} times better if they are taken "
        )
        text += f"as {layout}"
        sure = before > 2 * _MISFIT and images >= 30
        return [finding("validation_scaled_differently", text, 0.9 if sure else 0.6, certain=sure)]
    if not bool(off.any()):
        return []
    worst = float(torch.maximum(d.shift.abs(), d.ratio.log().abs())[off].max())
    text += (
        f": {float(d.shift[off].abs().max()):.3g} deviations apart, {float(d.shift_errors[off].max()):.3g} standard "
    )
    text += "errors"
    certain = bool((far & off).any())
    gravity = min(0.9, 0.6 + 0.1 * worst) if certain else min(0.6, 0.35 + 0.2 * worst)
    return [finding("validation_scaled_differently", text, gravity, certain=certain)]


def drift_seen(d: Drift | None) -> dict[str, Any]:
    """Plain data."""
    if d is None:
        return {}
    return {k: v if isinstance(v, dict) else v.tolist() for k, v in vars(d).items()}

"""What the labels alone show: constant, out of range, counted from 1, rare classes, batches sorted by class."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from knep.doctor.data.split_view import IGNORED, Split
from knep.doctor.findings import Finding, finding
from knep.utils.rng import generator

_CHANCE = 1e-6  # that a sound data set looks as sick as what is called certain
_ORDERS = 64  # random orders to compare the loader's with
_WINDOW = 32  # images: batches of fewer are looked at together
_SORTED = 8.0  # standard deviations
_RARE, _FAR = 8.0, 30.0  # largest class over smallest: suspect, certain


def label_findings(train: Split, val: Split | None, outputs: int, whole: bool) -> list[Finding]:
    """outputs: of the model; whole: whether `train` is a whole epoch, not just its first batches."""
    found = range_findings(train, val, outputs)
    if found:
        return found
    found = constant_findings(train, val, outputs, whole)
    if len(train.y.unique()) > 1:
        found = found + sorted_findings(train, val, whole)
        unknown = not whole and any(f.disease == "sorted_batches" for f in found)
        found += [] if unknown else imbalance_findings(train, val)
    return found


def range_findings(train: Split, val: Split | None, outputs: int) -> list[Finding]:
    """Labels that are no output's number; counted from 1 where 1..K occur and 0 never does."""
    found = []
    for name, part in (("training", train), ("validation", val)):
        if part is None:
            continue
        y = part.y[part.y != IGNORED]
        wrong = (y < 0) | (y >= outputs)
        if not bool(wrong.any()):
            continue
        share, low, high = 100 * float(wrong.double().mean()), int(y.min()), int(y.max())
        text = f"{name} labels go from {low} to {high}, and the model has {outputs} outputs, 0 to {outputs - 1}: "
        text += f"{share:.3g} % of the images have no output"
        if low == 1 and high == outputs:
            found.append(finding("labels_off_by_one", text, 1.0, mend=f"subtract 1 from the {name} labels"))
        else:
            found.append(finding("labels_out_of_range", text, 1.0))
    return found


def constant_findings(train: Split, val: Split | None, outputs: int, whole: bool) -> list[Finding]:
    """One label only. The first batches of a sorted split have one label too."""
    found = []
    others = 0 if val is None else len(val.y.unique())
    if len(train.y.unique()) == 1 and outputs > 1:
        text = f"all {len(train.y)} training images seen have the label {int(train.y[0])}"
        certain = _by_chance(len(train.y), outputs)
        if not whole and others > 1:
            text += f", and validation has {others} classes: the loader gives one class after the other"
            found.append(finding("sorted_batches", text, 0.95, certain=certain))
            certain = False
        found.append(finding("constant_labels", text, 0.95 if certain else 0.5, certain=certain))
    elif others == 1 and val is not None and _by_chance(len(val.y), outputs):
        text = f"all {len(val.y)} validation images seen have the label {int(val.y[0])}; training has more"
        found.append(finding("constant_labels", text, 0.4, certain=False))
    return found


def _by_chance(count: int, classes: int) -> bool:
    """Whether so many equal labels of so many classes are out of the question."""
    return -(count - 1) * math.log(max(classes, 2)) < math.log(_CHANCE)


def imbalance_findings(train: Split, val: Split | None) -> list[Finding]:
    """Rare classes and classes that training never shows, both beyond what drawing at random makes of equal classes."""
    present = train.y[train.y != IGNORED].unique(return_counts=True)[1]
    found = []
    if val is not None:
        found += _unseen(train, val)
    ratio = float(present.max() / present.min())
    # Poisson errors of both counts, so that few images a class are no imbalance.
    most, least = float(present.max()), float(present.min())
    sure = (most - 3 * math.sqrt(most)) / (least + 3 * math.sqrt(least) + 3)
    if ratio >= _RARE and sure > 2:
        rare = int((present * _RARE <= most).sum())
        text = (
            f"the largest class has {int(most)} of {len(train.y)} training images ({100 * most / len(train.y):.3g} %)"
        )
        text += f", the smallest {int(least)}: {ratio:.3g} to 1; {rare} of {len(present)} classes are {_RARE:g} times "
        text += "rarer than the largest"
        gravity = min(0.85, 0.35 + 0.2 * math.log10(ratio))
        found.append(finding("class_imbalance", text, gravity, certain=sure >= _FAR))
    return found


def _unseen(train: Split, val: Split) -> list[Finding]:
    """Classes of validation without one training image, though its share would make many."""
    classes = int(max(train.y.max(), val.y.max())) + 1
    here, there = (torch.bincount(part.y[part.y >= 0], minlength=classes) for part in (train, val))
    gone = ((here == 0) & (there > 0)).nonzero().flatten().tolist()
    if not gone:
        return []
    share = float(there[gone].sum()) / len(val.y)
    names = ", ".join(map(str, gone[:8])) + (", ..." if len(gone) > 8 else "")
    text = (
        f"class {names} never occurs among {len(train.y)} training images and makes {100 * share:.3g} % of validation"
    )
    certain = float(there[gone].max()) / len(val.y) * len(train.y) > -math.log(_CHANCE) and len(val.y) >= 20
    return [finding("class_imbalance", text, min(0.9, 0.4 + share), certain=certain)]


def sorted_findings(train: Split, val: Split | None, whole: bool) -> list[Finding]:
    """More equal labels within a batch than random order gives."""
    excess, deviations = grouping(train)
    if excess < 0.02 or deviations < _SORTED:
        return []
    kinds = _kinds(train)
    text = f"two images of a batch have the same class {excess:.2f} of the way from random order (0) to pure batches "
    text += f"(1), {deviations:.3g} standard deviations from random order; a batch has {kinds:.3g} of "
    text += f"{len(train.y.unique())} classes at the median"
    if not whole:
        text += "; the epoch was seen in part"
    return [finding("sorted_batches", text, min(0.95, 0.5 + excess), certain=excess > 0.15)]


def grouping(train: Split) -> tuple[float, float]:
    """(excess of equal labels within a window, in standard deviations of random order).

    A window is a batch, or as many as make 32 images. The excess is 0 at random order and 1 where each window has one
    class. Deviations come from 64 random orders; batches more even than random give negative ones.
    """
    labels = train.y.unique(return_inverse=True)[1]
    windows = _windows(train.batch)
    excess, spread = _pairs(labels, windows), []
    for trial in range(_ORDERS):
        order = torch.randperm(len(labels), generator=generator(trial, 11))
        spread.append(_pairs(labels[order], windows))
    drawn = torch.tensor(spread, dtype=torch.float64)
    size = torch.bincount(labels).double()
    same = float((size * (size - 1)).sum()) / max(1, len(labels) * (len(labels) - 1))
    if same >= 1 or len(windows.unique()) < 2:
        return 0.0, 0.0
    deviation = float(drawn.std()) + 1 / max(1, len(labels))
    return (excess - same) / (1 - same), (excess - float(drawn.mean())) / deviation


def _windows(batch: Tensor) -> Tensor:
    sizes = torch.bincount(batch)
    together = max(1, math.ceil(_WINDOW / max(1, int(sizes.max()))))
    return batch // together


def _pairs(labels: Tensor, windows: Tensor) -> float:
    """Share of equal labels among pairs within a window."""
    classes = int(labels.max()) + 1
    cells = windows * classes + labels
    counts = torch.unique(cells, return_counts=True)[1].double() if classes > 1000 else torch.bincount(cells).double()
    sizes = torch.bincount(windows).double()
    pairs = float((sizes * (sizes - 1)).sum())
    return float((counts * (counts - 1)).sum()) / pairs if pairs else 0.0


def _kinds(train: Split) -> float:
    names, y = train.y.unique(return_inverse=True)
    cells = torch.unique(train.batch * len(names) + y)
    return float(torch.bincount(cells // len(names)).double().median())


def labels_seen(train: Split) -> dict[str, Any]:
    """Plain data: images, classes, count of each that occurs (the first 100), how far batches are from random order."""
    counts = train.y.unique(return_counts=True)[1]
    excess, deviations = grouping(train)
    return {
        "images": len(train.y),
        "classes": len(counts),
        "counts": counts[:100].tolist(),
        "grouping": round(excess, 4),
        "grouping_deviations": round(deviations, 2),
    }

"""Whether labels have to do with the images, in each split and between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knep.doctor.data.baseline_accuracy import Guesses, Reference
from knep.doctor.findings import Finding, finding

_CLEAR = 5.0  # deviations above chance
_TOP = 0.3  # of the images, those that are guessed most surely


@dataclass(frozen=True)
class Noise:
    """How the surest guesses fail: `wrong`, their share that is wrong; `share`, of labels drawn at random that this
    would be; `even`, deviations by which the wrong labels are spread less evenly over the classes than random ones;
    `rise`, deviations by which less sure guesses are wrong more often; images: the surest.

    Labels drawn at random are wrong as often wherever the guess is sure, and name each class alike. Hard images are
    wrong less often where the guess is sure, and for classes that look alike.
    """

    wrong: float
    share: float
    even: float
    rise: float
    images: int


def noise(g: Guesses) -> Noise:
    wrong = (g.guess != g.label)[g.sure.argsort(descending=True, stable=True)].double()
    half, top = len(wrong) // 2, max(1, int(_TOP * len(wrong)))
    first, then = wrong[: half // 3], wrong[half // 3 : half]
    classes = len(torch.cat([g.guess, g.label]).unique())
    share = float(wrong[:top].mean())
    spread = math.sqrt(max(share * (1 - share), 1e-4) * (1 / max(1, len(first)) + 1 / max(1, len(then))))
    rise = float(then.mean() - first.mean()) / spread if len(first) and len(then) else 0.0
    surest = g.sure.argsort(descending=True, stable=True)[:top]
    return Noise(share, min(1.0, share * classes / max(1, classes - 1)), _evenness(g, surest), rise, top)


def _evenness(g: Guesses, which: Tensor) -> float:
    """Chi-square of the wrong labels against each class in its frequency, in deviations."""
    classes = int(max(g.guess.max(), g.label.max())) + 1
    wrong = which[g.guess[which] != g.label[which]]
    often = torch.bincount(g.label, minlength=classes).double()
    guessed = g.guess[wrong].unique()
    if len(guessed) == 0 or classes > 1000:
        return 0.0
    total, free = 0.0, 0
    for c in guessed.tolist():
        seen = torch.bincount(g.label[wrong][g.guess[wrong] == c], minlength=classes).double()
        others = often * (torch.arange(classes) != c)
        possible = others > 0
        fair = others[possible] / others.sum() * seen.sum()
        total += float(((seen[possible] - fair).square() / fair).sum())
        free += int(possible.sum()) - 1
    return (total - free) / math.sqrt(2 * free) if free else 0.0


def relation_findings(r: Reference, classes: int, foreign: bool) -> list[Finding]:
    """classes: of training; foreign: validation images are known to differ, which says nothing about their labels."""
    if not foreign:
        moved = _unlike(r) or _moved(r)
        if moved:
            return moved
    related, own = r.in_train.lift > _CLEAR, r.in_val.lift > 3
    carried = r.on_val.lift > _CLEAR - 1
    if not related and not carried:
        return _none(r, classes, own)
    many = r.images >= 30 * classes  # so that 15 neighbours can be of one class
    partly = _partly(r, "training", noise(r.train), r.held) if many else []
    if partly or foreign:
        return partly
    gain = r.in_train.acc - r.in_train.chance
    strong = gain > 0.3 and gain > 8 * r.on_val.spread
    if strong and r.acc < r.chance + gain / 2 and not carried:
        text = f"{_told(r)}. Training labels fit their images ({_agrees(r.in_train)})"
        text += f", validation labels {'fit theirs' if own else 'do not'} ({_agrees(r.in_val)})"
        sure = len(r.val.label) >= 100 and (not own or r.in_val.acc - r.in_val.chance > 0.3)
        name = "validation_scaled_differently" if own else "unrelated_labels"
        return [finding(name, text, 0.85 if sure else 0.5, certain=sure)]
    if not strong or r.held - r.acc < 0.1:
        return []
    found = _partly(r, "validation", noise(r.val), r.acc) if many and len(r.val.label) >= 100 else []
    if not found and own and r.acc < r.chance + gain / 2:
        text = f"{_told(r)}, and {_share(r.held)} of training; within validation {_agrees(r.in_val)}"
        found = [finding("validation_scaled_differently", text, 0.5, certain=False)]
    return found


def _unlike(r: Reference) -> list[Finding]:
    """Validation images on which neighbours of training fail, until they are taken in another layout or scale."""
    if not r.layouts:
        return []
    best = max(r.layouts, key=lambda name: r.layouts[name])
    margin = 0.1 + 4 * r.on_val.spread
    if best and r.layouts[best] <= r.layouts[""] + margin:
        best = ""
    # Of few classes, a wrong layout may put one in another's place, and so may a wrong label.
    if r.layouts[best] <= max(r.acc + margin, r.renamed, *r.shifted.values()):
        return []
    way = f"they are taken as {best}" if best else "they are given the mean and deviation of training"
    text = f"simple classifiers are right for {_share(r.acc)} of validation images as they are, and for "
    text += f"{_share(r.layouts[best])} if {way} (within training {_share(r.held)}, chance {_share(r.chance)})"
    return [finding("validation_scaled_differently", text, 0.9)]


def _moved(r: Reference) -> list[Finding]:
    """Validation labels that fit after a shift by one, or after another renaming."""
    clear = r.acc + 0.1 + 4 * r.on_val.spread
    for step, acc in r.shifted.items():
        if acc > clear and acc > 1.5 * r.acc:
            way = "more" if step < 0 else "less"
            text = f"guesses from training are right for {_share(r.acc)} of validation, and for {_share(acc)} if its "
            text += f"labels are taken one {'less' if step < 0 else 'more'} than they are"
            mend = f"validation labels are one {way} than those of training: count both from 0"
            return [finding("labels_off_by_one", text, 0.95, mend=mend)]
    if r.renamed > clear + 0.1 and r.renamed > 1.5 * r.acc and r.in_val.lift > _CLEAR:
        text = f"guesses from training are right for {_share(r.acc)} of validation, and for {_share(r.renamed)} after "
        text += "one renaming of the classes: the splits number them in different orders"
        mend = "use one list of class names for both splits"
        return [finding("unrelated_labels", text, 0.9, certain=len(r.val.label) >= 50, mend=mend)]
    return []


def _none(r: Reference, classes: int, own: bool) -> list[Finding]:
    if r.images < max(50, 3 * classes):
        return []  # too few to learn from, related or not
    both = (r.on_val, r.in_train)
    weights = [1 / a.spread**2 for a in both]
    acc = sum(w * a.acc for w, a in zip(weights, both, strict=True)) / sum(weights)
    low = acc + 3 / math.sqrt(sum(weights)) < r.chance + 0.3 * (1 - r.chance)
    many = r.images >= max(200, 10 * classes) and len(r.val.label) >= 40
    text = f"{_told(r)}; within training {_agrees(r.in_train)}"
    if own:
        text += f", though within validation {_agrees(r.in_val)}: the training labels are the wrong ones"
    return [finding("unrelated_labels", text, 0.95 if many and low else 0.5, certain=many and low)]


def _partly(r: Reference, name: str, n: Noise, best: float) -> list[Finding]:
    """A share of labels drawn at random, where no classifier does better than that leaves room for."""
    spread = math.sqrt(0.25 / n.images)
    if n.share < 0.12 or best > 1 - n.wrong + 0.03 + 2 * spread or n.even > 4 or n.rise > 4:
        return []
    text = (
        f"about {_share(n.share)} of the {name} labels have no relation to their images: where neighbours agree most, "
    )
    text += f"{_share(n.wrong)} of {n.images} labels are others, of every class alike; {_told(r)}"
    certain = n.share > 0.25 + 2 * spread and n.rise < 3 and n.images >= 150 and r.chance < 0.4
    return [finding("unrelated_labels", text, min(0.9, 0.4 + 0.5 * n.share), certain=certain)]


def _told(r: Reference) -> str:
    text = f"simple classifiers learn {_share(r.acc)} of validation from {r.images} training images"
    return f"{text}, chance is {_share(r.chance)}"


def _agrees(a: Any) -> str:
    return f"{_share(a.acc)}, chance {_share(a.chance)} +- {_share(a.spread)}"


def _share(x: float) -> str:
    return f"{100 * x:.3g} %"


def relation_seen(r: Reference) -> dict[str, Any]:
    """Plain data: the reference's accuracies, and how the surest guesses fail."""
    n = noise(r.train)
    return {
        "acc": r.acc,
        "knn": r.knn,
        "ridge": r.ridge,
        "patches": r.patches,
        "chance": r.chance,
        "within": r.in_train.acc,
        "shifted": {str(k): v for k, v in r.shifted.items()},
        "random_labels": n.share,
    }

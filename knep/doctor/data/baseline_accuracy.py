"""What simple classifiers reach on a patient's data: what a healthy training should at least come near."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from knep.doctor.data.baselines import Patches, nearest, random_relu, ridge, small, voted
from knep.doctor.data.shift import undone
from knep.doctor.data.split_view import Split, evenly, split
from knep.doctor.subject.setup import Patient

_NEAREST, _MANY = 5, 15  # neighbours, to be right and to be sure
_TURNED = 500  # images of validation that are tried in other layouts
_RENAMED = 200  # classes at most whose renaming is looked for
_QUERIES = 2000  # images of a split that are guessed


@dataclass(frozen=True)
class Agreement:
    """acc: share of right guesses, in [0, 1]; chance: what the frequencies of guesses and labels alone would give;
    spread: the standard deviation of acc if there were nothing but chance.
    """

    acc: float
    chance: float
    spread: float

    @property
    def lift(self) -> float:
        """Above chance, in deviations."""
        return (self.acc - self.chance) / self.spread


@dataclass(frozen=True)
class Guesses:
    """Of n images by their 15 nearest in training without themselves: the guessed class and the label, both int64
    (n,), and the share of votes for the guess, (n,).
    """

    guess: Tensor
    label: Tensor
    sure: Tensor


@dataclass(frozen=True)
class Reference:
    """Accuracies in [0, 1].

    knn, ridge, patches: of 5 nearest neighbours, ridge regression on random ReLU features, and on pooled responses to
    random patches, learned from training and measured on validation; on_val: the best of them; in_train, in_val: of one
    split's images guessed from the others of the same split, the surest; held: the best such accuracy in training;
    shifted: on validation with its labels taken one less (-1) and one more (1), modulo the classes; renamed: after the
    best one-to-one renaming of classes, found on one half of validation and measured on the other, 0 for more than
    200 classes; layouts: where validation is far worse than training, knn on it with its own mean and deviation, as
    it is ("") and taken back from each wrong layout; images: that were learned from; train, val: guesses with their
    certainty, for both splits.
    """

    knn: float
    ridge: float
    patches: float
    on_val: Agreement
    in_train: Agreement
    in_val: Agreement
    held: float
    shifted: dict[int, float]
    renamed: float
    layouts: dict[str, float]
    images: int
    train: Guesses
    val: Guesses

    @property
    def acc(self) -> float:
        """The best of the three classifiers on validation."""
        return max(self.knn, self.ridge, self.patches)

    @property
    def chance(self) -> float:
        return self.on_val.chance


def reference(patient: Patient, images: int = 2000) -> Reference | None:
    """From so many training images, spread evenly over their order, and at most 2,000 of validation; deterministic.

    Measured, with data standardised, against a plain MLP (one hidden layer) and CNN (two convolutions) after 12 to 20
    epochs of Adam: digits, 1,280 images: 0.993 (MLP 0.979, CNN 0.979); Fashion-MNIST, 1,984 images: 0.839 (0.821,
    0.843), 4,992 images: 0.873; synthetic with noise 80, 896 images: 1.000 (1.000, 1.000). 0.1, 0.5, 1.1 and 0.15
    seconds of one core.

    None where a split has no finite image, training has fewer than 10 distinct ones, or one class.
    """
    train, val = split(patient, "train", images), split(patient, "val", _QUERIES)
    return None if train is None or val is None else compared(train, val, patient.num_classes, images)


def compared(train: Split, val: Split, classes: int, images: int = _QUERIES) -> Reference | None:
    """The reference of splits that were looked at, from so many images of training; labels from 0 to classes - 1."""
    once = torch.tensor(sorted({train.key[i]: n for n, i in enumerate(train.at.tolist())}.values()), dtype=torch.long)
    once, theirs = once[_inside_range(train.labels[once], classes)], _inside_range(val.labels, classes)
    if len(once) < 10 or not len(theirs) or train.small.shape[1:] != val.small.shape[1:]:
        return None
    once, theirs = once[evenly(len(once), images)], theirs[evenly(len(theirs), _QUERIES)]
    names, y = train.labels[once].unique(return_inverse=True)
    if len(names) < 2:
        return None
    labels = val.labels[theirs]
    x, v = _scaled(train.small[once], val.small[theirs])
    flat, flat_v, patches = small(x).flatten(1), small(v).flatten(1), Patches(x)
    ours, theirs = nearest(flat, flat, _MANY, torch.arange(len(x))), nearest(flat, flat_v, _MANY)
    guesses = [voted(y, theirs[:, :_NEAREST])[0]]
    own = [_guessed(voted(y, ours[:, :_NEAREST])[0], y)]
    for a, b in ((random_relu(x), random_relu(v)), (patches(x), patches(v))):
        guess, inside, held = ridge(a, y, b)
        guesses.append(guess)
        own.append(_guessed(inside, y[held]))
    guesses = [names[guess] for guess in guesses]
    accs = [float((guess == labels).double().mean()) for guess in guesses]
    classes, held = int(max(names.max(), labels.max())) + 1, max(a.acc for a in own)
    return Reference(
        *accs,
        on_val=max((_guessed(g, labels) for g in guesses), key=lambda a: a.acc),
        in_train=max(own, key=lambda a: a.lift),
        held=held,
        in_val=_inside(flat_v, labels),
        shifted={s: max(float((g == (labels + s) % classes).double().mean()) for g in guesses) for s in (-1, 1)},
        renamed=max(_renamed(g, labels, classes) for g in guesses),
        layouts=_layouts(x, y, v, names, labels) if max(accs) < held - 0.05 else {},
        images=len(x),
        train=_sure(voted(y, ours), names, names[y]),
        val=_sure(voted(y, theirs), names, labels),
    )


def _inside_range(labels: Tensor, classes: int) -> Tensor:
    return ((labels >= 0) & (labels < classes)).nonzero().flatten()


def _scaled(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean and deviation of x, by channel."""
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True, correction=0)
    std = torch.where(std > 0, std, 1.0)
    return (x - mean) / std, (v - mean) / std


def _guessed(guess: Tensor, label: Tensor) -> Agreement:
    classes = int(max(guess.max(), label.max())) + 1
    often = torch.bincount(guess, minlength=classes).double() / len(guess)
    chance = float(often @ (torch.bincount(label, minlength=classes).double() / len(label)))
    # One guess more or less is always within chance.
    spread = math.sqrt(max(chance * (1 - chance), 0) / len(label)) + 0.5 / len(label)
    return Agreement(float((guess == label).double().mean()), chance, spread)


def _sure(vote: tuple[Tensor, Tensor], names: Tensor, label: Tensor) -> Guesses:
    return Guesses(names[vote[0]], label, vote[1])


def _inside(x: Tensor, label: Tensor) -> Agreement:
    _, y = label.unique(return_inverse=True)
    if len(x) < 3:
        return Agreement(0.0, 0.0, 1.0)
    near = nearest(x, x, _NEAREST, torch.arange(len(x)))
    return _guessed(voted(y, near)[0], y)


def _renamed(guess: Tensor, label: Tensor, classes: int) -> float:
    """Accuracy on the odd images after the renaming that suits the even ones best."""
    from scipy.optimize import linear_sum_assignment

    if len(guess) < 4 or classes > _RENAMED:
        return 0.0
    seen = torch.bincount(guess[::2] * classes + label[::2], minlength=classes**2).reshape(classes, -1)
    _, name = linear_sum_assignment(seen.numpy(), maximize=True)
    return float((torch.from_numpy(name)[guess[1::2]] == label[1::2]).double().mean())


def _layouts(x: Tensor, y: Tensor, v: Tensor, names: Tensor, label: Tensor) -> dict[str, float]:
    few = evenly(len(v), _TURNED)
    x, v, label = small(x), small(v[few]), label[few]
    v = (v - v.mean()) / v.std(correction=0).clamp_min(1e-12)
    x = (x - x.mean()) / x.std(correction=0).clamp_min(1e-12)

    def right(taken: Tensor) -> float:
        guess, _ = voted(y, nearest(x.flatten(1), taken.flatten(1), _NEAREST))
        return float((names[guess] == label).double().mean())

    return {"": right(v)} | {name: right(taken) for name, taken in undone(v).items()}

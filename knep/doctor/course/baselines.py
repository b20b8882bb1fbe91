"""What simple methods reach on validation: ridge regression and nearest neighbours, or the token before."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from knep.doctor.course.skill import explained, of_guesses, of_scores
from knep.doctor.subject.any_task import Subject

_ROWS, _COLUMNS = 2000, 600


def baselines(subject: Subject) -> dict[str, float]:
    """Name -> skill on validation; empty where none fits the form of the data."""
    train, val = (subject.stacked(s, _ROWS) for s in ("train", "val"))
    if train is None or val is None or len(val[0]) < 10 or len(train[0]) < 20 or train[0].shape[1:] != val[0].shape[1:]:
        return {}
    if subject.task in ("tokens", "tagging"):
        return _of_places(train, val)
    if subject.task == "segmentation":
        return _of_pixels(train, val)
    x, v = train[0].flatten(1), val[0].flatten(1)
    if subject.task == "other" or x.shape[1] > _COLUMNS:
        return {}
    if not x.is_floating_point():
        x, v = _counts(x, v)
    if not bool(x.isfinite().all() and v.isfinite().all()):
        return {}
    mean, size = x.double().mean(0), x.double().std(0, correction=0)
    use = size > 1e-9
    x, v = (((t.double() - mean) / size.clamp(min=1e-9))[:, use] for t in (x, v))
    return _fitted(subject, x, train[1], v, val[1])


def _counts(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """How often each token occurs in a row."""
    top = min(int(max(x.max(), v.max())) + 1, _COLUMNS)

    def of(t: Tensor) -> Tensor:
        t = t.long().clamp(0, top - 1)
        return torch.zeros(len(t), top).scatter_add_(1, t, torch.ones(t.shape))

    return of(x), of(v)


def _fitted(subject: Subject, x: Tensor, y: Tensor, v: Tensor, w: Tensor) -> dict[str, float]:
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.linear_model import Ridge
    from sklearn.neighbors import KNeighborsRegressor

    classes = subject.task == "multiclass"
    if classes:
        wanted = torch.nn.functional.one_hot(y.long().reshape(len(y)).clamp(min=0)).double()
    else:
        wanted = y.double().reshape(len(y), -1)
    methods = {
        "ridge regression": Ridge(alpha=1.0 + 0.01 * len(x)),
        "nearest neighbours": KNeighborsRegressor(min(10, len(x) // 2)),
        "random trees": ExtraTreesRegressor(40, min_samples_leaf=3, random_state=0, n_jobs=1),
    }
    found = {}
    for name, method in methods.items():
        if name == "random trees" and (x.shape[1] > 100 or max(found.values()) > 0.7):
            continue
        answer = np.asarray(method.fit(x.numpy(), wanted.numpy()).predict(v.numpy())).reshape(len(v), -1)
        guess = torch.from_numpy(answer)
        if classes:
            found[name] = of_guesses(guess.argmax(1), w.long().reshape(len(w)))
        elif subject.task in ("binary", "multilabel"):
            found[name] = of_scores(guess, w.double().reshape(len(w), -1))
        else:
            found[name] = explained(guess, w.double().reshape(len(w), -1))
    return found


def _of_pixels(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Random trees on the 5 x 5 numbers around a pixel, of a few thousand pixels."""
    from sklearn.ensemble import ExtraTreesRegressor

    x, y = train
    y = y[:, 0] if y.ndim == 4 else y
    if x.ndim != 4 or x.shape[2:] != y.shape[1:] or not x.is_floating_point():
        return {}
    parts = []
    for images, labels in (train, val):
        labels = labels[:, 0] if labels.ndim == 4 else labels
        near = torch.nn.functional.unfold(images[:200].float(), 5, padding=2).transpose(1, 2).flatten(0, 1)
        flat = labels[:200].flatten().long()
        index = torch.linspace(0, len(flat) - 1, min(3000, len(flat))).round().long()
        parts.append((near[index], flat[index]))
    (x, y), (v, w) = ((a[b >= 0], b[b >= 0]) for a, b in parts)
    if not len(y) or not len(w) or int(y.max()) > 200:
        return {}
    wanted = torch.nn.functional.one_hot(y).double()
    trees = ExtraTreesRegressor(20, min_samples_leaf=5, max_features=0.3, random_state=0, n_jobs=1)
    guess = torch.from_numpy(np.asarray(trees.fit(x.numpy(), wanted.numpy()).predict(v.numpy())).reshape(len(v), -1))
    return {"trees on the numbers around a pixel": of_guesses(guess.argmax(1), w)}


def _of_places(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The most frequent target behind each token."""
    (x, y), (v, w) = train, val
    if x.is_floating_point() or x.shape != y.shape or y.is_floating_point() or int(x.max()) > 5000:
        return {}
    tokens, labels = int(max(x.max(), v.max())) + 1, int(y.max()) + 1
    counted = y >= 0
    table = torch.zeros(tokens, labels)
    table.view(-1).index_add_(0, (x.long() * labels + y.long())[counted], torch.ones(int(counted.sum())))
    usual = table.sum(0)
    guess = (table + 1e-3 * usual / usual.sum()).argmax(1)[v.long()]
    there = w >= 0
    return {"the most frequent target of each token": of_guesses(guess[there], w[there].long())}

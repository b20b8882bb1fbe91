"""Whom knep is measured beside: scikit-learn's estimators and loops by hand, on the rows that knep gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knep.config.compose import Composed
from knep.data.base import ImageData
from knep.models.transformer import transformer
from knep.models.unet import unet

Split = tuple[np.ndarray, np.ndarray]
_EVALUATED = 64  # rows of text at a time
_WARM = 0.05  # share of the steps of a loop by hand, as knep's cosine has it
_PATCH = 15  # pixels of a side: wherever a pixel lies in a digit of 8, its square holds the digit
_PIXELS = 2000  # of each class that a forest learns by
_SCENES = 10  # whose patches are in memory at a time


def parts(data: ImageData) -> tuple[Split, Split]:
    """Rows to fit on and rows of the test. A rival fits on validation's rows too: it chooses nothing by them."""
    train = torch.cat(list(data.train_images())), torch.cat(list(data.train_targets()))
    val, test = (
        tuple(torch.cat(column) for column in zip(*((x, y) for x, y, *_ in loader), strict=True))
        for loader in (data.val_dataloader(), data.test_dataloader())
    )
    x, y = (torch.cat(both).numpy() for both in zip(train, val, strict=True))
    return (x, y), (test[0].numpy(), test[1].numpy())


def _rmse(model: Any, data: ImageData) -> float:
    (x, y), (test_x, test_y) = parts(data)
    return float(np.sqrt(np.mean((model.fit(x, y).predict(test_x) - test_y) ** 2)))


def mlp_regressor(made: Composed, data: ImageData) -> float:
    from sklearn.neural_network import MLPRegressor

    return _rmse(MLPRegressor(random_state=made.config["seed"]), data)


def boosting(made: Composed, data: ImageData) -> float:
    from sklearn.ensemble import HistGradientBoostingRegressor

    return _rmse(HistGradientBoostingRegressor(random_state=made.config["seed"]), data)


def mlp_classifier(made: Composed, data: ImageData) -> float:
    from sklearn.neural_network import MLPClassifier

    (x, y), (test_x, test_y) = parts(data)
    return float(MLPClassifier(random_state=made.config["seed"]).fit(x, y).score(test_x, test_y))


def mlp_labels(made: Composed, data: ImageData) -> float:
    """The macro F1, by scikit-learn."""
    from sklearn import metrics
    from sklearn.neural_network import MLPClassifier

    (x, y), (test_x, test_y) = parts(data)
    found = MLPClassifier(random_state=made.config["seed"]).fit(x, y).predict(test_x)
    never: Any = {"zero_division": 0}  # a label that nobody predicts counts as 0, as in knep's
    return float(metrics.f1_score(test_y, found, average="macro", **never))


def language_loop(made: Composed, data: ImageData) -> float:
    """The same transformer in a loop by hand; perplexity."""
    rows, net = torch.cat(list(data.train_images())), language_net(made, data)

    def loss(x: Tensor, _: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction=reduction)

    by_hand(net, loss, made, data.batch_size, rows, rows)
    test = torch.cat([x for x, *_ in data.test_dataloader()])
    with torch.no_grad():
        total = torch.stack([loss(x, x, "sum") for x in test.split(_EVALUATED)]).sum()
    return float((total / test[:, 1:].numel()).exp())


def language_net(made: Composed, data: ImageData) -> nn.Module:
    """The transformer as knep's run builds it, with the same first weights."""
    torch.manual_seed(made.config["seed"])
    sizes = {key: made.config["model"][key] for key in ("width", "depth", "heads")}
    return transformer(data.channels, data.num_classes, data.image_size, **sizes)


def segmentation_loop(made: Composed, data: ImageData) -> float:
    """The same U-net with batch norm in a loop by hand; the mean of the classes' intersection over union."""
    torch.manual_seed(made.config["seed"])
    net = unet(
        data.channels, data.num_classes, data.image_size, widths=made.config["model"]["widths"], norm=nn.BatchNorm2d
    )

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x / 255), y)

    x, y = torch.cat(list(data.train_images())), torch.cat(list(data.train_targets()))
    by_hand(net, loss, made, data.batch_size, x, y)
    net.eval()
    with torch.no_grad():
        found = [(net(x / 255).argmax(1), y) for x, y, *_ in data.test_dataloader()]
    return iou(*(torch.cat(part) for part in zip(*found, strict=True)))


def patches_forest(made: Composed, data: ImageData) -> float:
    """A random forest that names each pixel by the square of pixels around it, from some pixels of each class."""
    from sklearn.ensemble import RandomForestClassifier

    (x, y), (test_x, test_y) = parts(data)
    rng = np.random.default_rng(made.config["seed"])
    rows, names = patches(x), y.reshape(-1)
    some = np.concatenate(
        [rng.permutation(np.flatnonzero(names == name))[:_PIXELS] for name in range(data.num_classes)]
    )
    forest = RandomForestClassifier(random_state=made.config["seed"]).fit(rows[some], names[some])
    pieces = [test_x[at : at + _SCENES] for at in range(0, len(test_x), _SCENES)]
    found = np.concatenate([forest.predict(patches(part)) for part in pieces])
    return iou(torch.from_numpy(found).reshape(test_y.shape), torch.from_numpy(test_y))


def by_hand(
    net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], made: Composed, size: int, x: Tensor, y: Tensor
) -> None:
    """Trains as a tutorial would, without any of knep's training: AdamW, a cosine that is warmed up, float32."""
    values, epochs = made.config["optimizer"], made.config["trainer"]["max_epochs"]
    steps = epochs * (len(x) // size)
    warm = max(1, round(_WARM * steps))
    optimizer = torch.optim.AdamW(net.parameters(), values["lr"], weight_decay=values["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warm, (1 + math.cos(math.pi * k / steps)) / 2)
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) < size:
                continue
            value = loss(x[rows], y[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()


def iou(found: Tensor, wanted: Tensor) -> float:
    """The mean over classes of the pixels that both name so, by those that either does."""
    shares = []
    for name in wanted.unique():
        ours, theirs = found == name, wanted == name
        shares.append((ours & theirs).sum() / (ours | theirs).sum())
    return float(torch.stack(shares).mean())


def patches(x: np.ndarray) -> np.ndarray:
    """uint8 (N H W, side^2): of images (N, 1, H, W) the square around each pixel, 0 beyond the edge."""
    reach = _PATCH // 2
    wide = np.pad(x[:, 0], ((0, 0), (reach, reach), (reach, reach)))
    windows = np.lib.stride_tricks.sliding_window_view(wide, (_PATCH, _PATCH), axis=(1, 2))
    return windows.reshape(-1, _PATCH**2)

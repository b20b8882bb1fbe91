"""Test-time augmentation: which views of an image to average, chosen one by one on validation alone.

The views are those of training's own stages, each drawn a few times, and the image as it is. As Molchanov et al. 2020
("Greedy Policy Search") do, a view joins while the log-likelihood of the mean prediction on validation grows; the test
split is read once, with the views that were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from knep.config.compose import compose_config
from knep.config.instantiate import instantiate
from knep.engine.load import load_members, stored_data
from knep.errors import InputError
from knep.io.run_folder import read_again
from knep.recipes.augment.base import Stage
from knep.recipes.augment.stages import Stages
from knep.tasks.base import Weighted

if TYPE_CHECKING:
    from knep.engine.module import Classifier

_LEAST = 1e-4  # nats an image that a view has to bring


@dataclass(frozen=True)
class View:
    """A stage of augment and the number of its draw; the image as it is where stage is ""."""

    stage: str
    draw: int

    def __str__(self) -> str:
        return f"{self.stage} {self.draw}" if self.stage else "as it is"


@dataclass(frozen=True)
class Chosen:
    """Views, and loss (nats an image) and accuracy of their mean prediction on a split, beside the image's alone."""

    views: tuple[View, ...]
    loss: float
    acc: float
    plain_loss: float
    plain_acc: float


def choose(run: Path, names: Sequence[str] = (), draws: int = 4, most: int = 8, test: bool = False) -> list[Chosen]:
    """The views of a finished run, and what they reach on validation, and on `test` where it is asked for.

    names: options of augment, by default those that the run trained with. Raises InputError for a run of another task,
    and where no stage keeps the class and the size of each image.
    """
    members = load_members(run)
    module, data = members[0], stored_data(members[0])
    if module.task.name != "multiclass":
        raise InputError(f"views of images are averaged for classes, and this run is of task={module.task.name}")
    stages = _stages(module, names, data.image_size)
    views = [View("", 0), *(View(name, draw) for name in stages for draw in range(draws))]
    seen, y = _predicted(members, stages, views, data.val_dataloader())
    picked = _greedy(seen, y, most)
    found = [_measured(tuple(views[i] for i in picked), seen[picked], seen[0], y)]
    if test:
        kept = [views[0], *found[0].views]
        seen, y = _predicted(members, stages, kept, data.test_dataloader())
        read_again(run)
        found.append(_measured(found[0].views, seen[1:], seen[0], y))
    return found


def _stages(module: Classifier, names: Sequence[str], side: int) -> dict[str, Stage]:
    """Name -> stage, of those that keep each image's class, its place in the batch and its side in pixels."""
    augment = module.augment
    if names:
        augment = instantiate(compose_config([f"augment=[{','.join(names)}]"]).run.slots["augment"])
    several = dict(augment.stages.items()) if isinstance(augment, Stages) else {type(augment).__name__.lower(): augment}
    left = {
        name: stage
        for name, stage in several.items()
        if isinstance(stage, Stage) and not (stage.mixes or stage.repeats or stage.sizes(side))
    }
    if not left:
        given = f"augment=[{','.join(names)}]" if names else "the run's augment"
        raise InputError(f"{given} has no stage that keeps the class and the size of each image: write --stages flip")
    return left


@torch.no_grad()
def _predicted(
    members: Sequence[Classifier], stages: dict[str, Stage], views: Sequence[View], batches: Iterable[Any]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (V, N, K) of each view, the members' mean, and classes (N,)."""
    device = next(members[0].parameters()).device
    for member in members:
        member.eval()
    for stage in stages.values():
        stage.train()
    parts: list[list[Tensor]] = [[] for _ in views]
    labels = []
    for number, (x, target) in enumerate(batches):
        y = target.target if isinstance(target, Weighted) else target
        known = y >= 0
        x, y = x[known].to(device), y[known].to(device)
        for i, view in enumerate(views):
            parts[i].append(_of(members, _seen(stages, view, x, y, number)))
        labels.append(y)
    return torch.stack([torch.cat(p) for p in parts]), torch.cat(labels)


def _seen(stages: dict[str, Stage], view: View, x: Tensor, y: Tensor, number: int) -> Tensor:
    """A batch as a view has it, the same at every look."""
    if not view.stage:
        return x
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(1_000_003 * view.draw + number)
        return cast("Tensor", stages[view.stage](x, y, 0)[0])


def _of(members: Sequence[Classifier], x: Tensor) -> Tensor:
    logp_MNK = torch.stack([m(x).float().log_softmax(-1) for m in members])
    return logp_MNK.logsumexp(0) - torch.tensor(float(len(members))).log()


def _loss(logp_VNK: Tensor, y: Tensor) -> float:
    """Mean -log p_y of the mean prediction, in nats."""
    mean = logp_VNK.logsumexp(0) - torch.tensor(float(len(logp_VNK))).log()
    return float(-mean.gather(1, y[:, None]).mean())


def _greedy(logp_VNK: Tensor, y: Tensor, most: int) -> list[int]:
    """Views that lower the loss one by one, from the image as it is, which every set has; at most so many."""
    picked = [0]
    loss = _loss(logp_VNK[picked], y)
    while len(picked) < min(most, len(logp_VNK)):
        rest = [i for i in range(len(logp_VNK)) if i not in picked]
        found = {i: _loss(logp_VNK[[*picked, i]], y) for i in rest}
        best = min(found, key=lambda i: found[i])
        if found[best] > loss - _LEAST:
            break
        picked, loss = [*picked, best], found[best]
    return picked


def _measured(views: tuple[View, ...], logp_VNK: Tensor, plain_NK: Tensor, y: Tensor) -> Chosen:
    answers = logp_VNK.logsumexp(0).argmax(1)
    return Chosen(
        views,
        _loss(logp_VNK, y),
        float((answers == y).float().mean()),
        _loss(plain_NK[None], y),
        float((plain_NK.argmax(1) == y).float().mean()),
    )

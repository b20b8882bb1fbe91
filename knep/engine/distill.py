"""Distillation: a run learns from the probabilities of an earlier one as well as from its labels (distill.teacher)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knep.config.schema import DataSpec, RunConfig
from knep.data.base import ImageData
from knep.engine.evaluate import evaluate
from knep.engine.load import load_members
from knep.errors import InputError
from knep.utils.text import shown


def distilled(loss: Tensor, output: Tensor, probabilities: Tensor, alpha: float, temperature: float) -> Tensor:
    """(1 - alpha) loss + alpha T^2 KL(teacher || student), both softened by T (Hinton et al. 2015, sec. 2).

    loss: 0-dim, of the labels; output: the student's scores (N, K); probabilities: the teacher's at T, (N, K).
    T^2 keeps the gradients' size where T changes.
    """
    soft = F.kl_div((output / temperature).log_softmax(1), probabilities, reduction="batchmean")
    return (1 - alpha) * loss + alpha * temperature**2 * soft


class Teacher:
    """The models of a run folder, frozen, in eval mode; not a module of the student, whose weights alone are saved.

    alpha: share of the teacher's part in the loss; temperature: T.
    """

    def __init__(self, members: Sequence[nn.Module], alpha: float, temperature: float) -> None:
        self.members, self.alpha, self.temperature = members, alpha, temperature
        for member in members:
            member.eval().requires_grad_(False)

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """The mean over the models, at T, for raw inputs as the student gets them: (N, K)."""
        for member in self.members:
            if next(member.parameters()).device != x.device:
                member.to(x.device)
        scores = torch.stack([member(x).float() for member in self.members])
        return (scores / self.temperature).softmax(-1).mean(0)

    def guide(self, x: Tensor, output: Tensor, loss: Tensor) -> Tensor:
        return distilled(loss, output, self.probabilities(x), self.alpha, self.temperature)


def teacher_of(run: RunConfig, spec: DataSpec, data: ImageData) -> tuple[Teacher | None, str | None]:
    """The teacher that the run names, and a line on how good it is on the validation split; None where it names none.

    Raises InputError where it learned other classes, reads other images, or guesses no better than the commonest class.
    """
    node: Mapping[str, Any] = run.distill or {}
    if node.get("teacher") is None:
        return None, None
    place = str(node["teacher"])
    if run.task_name != "multiclass":
        raise InputError(f"distill.teacher gives probabilities of classes, and task={run.task_name} learns none")
    members = load_members(Path(place))
    about = DataSpec.stored(members[0].about)
    if members[0].task.name != "multiclass" or about.class_names != spec.class_names:
        raise InputError(
            f"distill.teacher={shown(place)} learned {_few(about.class_names)}, and the data have "
            f"{_few(spec.class_names)}: give a run on the same classes"
        )
    if about.row != spec.row:
        raise InputError(f"distill.teacher={shown(place)} reads inputs {about.row}, and the data have {spec.row}")
    found = evaluate(members, data.val_dataloader(), spec.num_classes)
    commonest = float(found.confusion_KK.sum(1).max() / found.confusion_KK.sum())
    low, _ = found.interval()
    if low <= commonest:
        raise InputError(
            f"distill.teacher={shown(place)} has {found.acc:.1%} on the validation split, not surely more "
            f"than its commonest class, {commonest:.1%}: give one that has learned"
        )
    said = f"teacher {shown(place)}: {len(members)} model(s), {found.acc:.2%} on the validation split"
    return Teacher(members, float(node["alpha"]), float(node["temperature"])), said


def _few(names: Sequence[str]) -> str:
    some = ", ".join(map(shown, names[:3]))
    return f"{len(names)} classes ({some}{', ...' if len(names) > 3 else ''})"

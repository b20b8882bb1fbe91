"""A subject of somebody's model, loaders, optimizer and loss, as `knep.doctor.examine` is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from knep.doctor.subject.any_batch import taken
from knep.doctor.subject.any_task import TASKS, Forward, Loss, Subject, kept
from knep.doctor.subject.copies import copied, unwrapped
from knep.doctor.subject.rng_isolation import undisturbed
from knep.doctor.subject.setup import maker
from knep.errors import InputError

_MOST = 600  # batches
_EPOCHS = 10  # where nobody says


def subject_of(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    loss: Loss | None = None,
    task: str | None = None,
    forward: Forward | None = None,
    epochs: int | None = None,
    seed: int = 0,
) -> Subject:
    """What is examined, of somebody's model, loaders, optimizer and loss; all of them stay as they are.

    Raises InputError for an unknown task, a loader without a batch and a model without parameters.
    """
    if task is not None and task not in TASKS:
        raise InputError(f"task={task} is none of {', '.join(TASKS)}")
    given_eval = not model.training
    model = unwrapped(model)
    own = copied(model)
    with undisturbed(seed, train, val):
        seen, whole = kept(train, _MOST)
        held, _ = kept(val, 64) if val is not None else ([], True)
    if not seen:
        raise InputError("the training loader gives no batch: check its data set and drop_last")
    if next(own.parameters(), None) is None:
        raise InputError("the model has no parameters: there is nothing to train")
    steps = len(seen)
    subject = Subject(
        model=own,
        train=seen,
        val=held,
        make_optimizer=maker(model, optimizer),
        loss=loss,
        run_forward=forward,
        asked=task,
        loaders=(train, val),
        given={id(p): n for n, p in model.named_parameters()},
        optimizer=optimizer if isinstance(optimizer, Optimizer) else None,
        epochs=epochs or _EPOCHS,
        guessed_length=epochs is None,
        steps=steps,
        whole=whole,
        eval_given=given_eval,
        seed=seed,
    )
    return subject if val is not None else _held_back(subject)


def _held_back(subject: Subject) -> Subject:
    """Every tenth batch is for validation; every tenth row, where there is but one batch."""
    seen = subject.train
    if len(seen) > 1:
        return replace(subject, train=[b for i, b in enumerate(seen) if i % 10], val=list(seen[::10]))
    rows = subject.rows(seen[0])
    index = torch.arange(rows)
    if rows < 10:
        return subject
    train, val = (taken(seen[0], rows, index[(index % 10 == 0) == held]) for held in (False, True))
    return replace(subject, train=[train], val=[val])

"""The user's loss on labels as the loader gives them: whether it takes them, and each row with its own."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.doctor.subject.batches import Form
from knep.doctor.subject.rng_isolation import undisturbed
from knep.doctor.subject.setup import Patient
from knep.errors import InputError

_ROWS = 12


def check_loss(patient: Patient) -> None:
    """Raises InputError where a loss of another project, or cross-entropy on labels of another form than int64 (N,),
    fails on the labels as the loader gives them, and where it compares each row with the labels of all."""
    form, classes = patient.form, patient.num_classes
    if patient.loss is None and form == Form():
        return
    labels = torch.cat([y for _, y in patient.train])
    top = int(labels.max())
    if form.dtype.is_floating_point and top >= classes:
        raise InputError(
            f"the labels are {form.dtype} up to {top} where the model gives {classes} scores: the doctor examines "
            "classifiers, and no regression"
        )
    known = labels[(labels >= 0) & (labels < classes)].cpu()
    if not len(known):
        return  # a disease of the data, which is told as such
    y = known[_spread(known)].to(patient.device)
    # Within (0, 1) and better than chance: what a loss of scores, of probabilities and of their logarithms takes.
    drawn = torch.rand(len(y), classes, generator=torch.Generator().manual_seed(0))
    scores = 0.1 + 0.75 * F.one_hot(y, classes) + 0.05 * drawn.to(y.device)
    with torch.no_grad(), undisturbed(patient.seed):
        patient.criterion(scores, y)
        if form.columns in (None, 1) and _mixes_rows(patient, scores, y):
            _refuse(patient, scores, y)


def _spread(y: Tensor) -> Tensor:
    """Indices of a few labels, of as many classes as there are."""
    order = y.argsort(stable=True)
    return order[torch.linspace(0, len(y) - 1, min(len(y), _ROWS)).round().long()].unique()


def _mixes_rows(patient: Patient, scores: Tensor, y: Tensor) -> bool:
    """Whether the loss of the batch is that of its rows only with the labels in the other of (N,) and (N, 1)."""
    other = _turned(patient)
    try:
        rows = torch.stack([patient.criterion(s[None], k[None]).reshape(()) for s, k in zip(scores, y, strict=True)])
        given, turned = (p.criterion(scores, y).reshape(()) for p in (patient, other))
    except InputError:  # it takes one of the two forms, or no single row
        return False
    wanted = torch.stack([rows.mean(), rows.sum()])
    return not _any_close(wanted, given) and _any_close(wanted, turned)


def _turned(patient: Patient) -> Patient:
    return replace(patient, form=replace(patient.form, columns=1 if patient.form.columns is None else None))


def _any_close(wanted: Tensor, value: Tensor) -> bool:
    return bool(torch.isclose(wanted, value, rtol=1e-3, atol=1e-5).any())


def _refuse(patient: Patient, scores: Tensor, y: Tensor) -> None:
    other, n = _turned(patient), len(y)
    given, row = (float(p.criterion(scores, y)) for p in (patient, other))
    forms = [str(p.form).partition(" ")[2] for p in (patient, other)]
    mend = "y.squeeze(1)" if patient.form.columns == 1 else "y.unsqueeze(1)"
    raise InputError(
        f"the loss compares each of {n} rows with the labels of all, as a table of {n} x {n}: it is {given:.3g} with "
        f"labels {forms[0]} as the loader gives them, and {row:.3g}, the loss of the rows, with {forms[1]}: write "
        f"{mend}"
    )

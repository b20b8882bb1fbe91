"""Diseases of the data: what images and labels show before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from knep.doctor.entrance import Entrance, entrance
from knep.doctor.findings import Finding, ordered
from knep.doctor.inputs import input_findings, inputs_seen
from knep.doctor.labels import label_findings, labels_seen
from knep.doctor.patient import Patient
from knep.doctor.split import Split, split
from knep.doctor.twins import twin_findings, twins_seen
from knep.errors import InputError


@dataclass(frozen=True)
class Data:
    """Both splits of a patient, looked at once."""

    patient: Patient

    @cached_property
    def train(self) -> Split:
        train = split(self.patient, "train")
        if train is None:
            raise InputError("there are no training batches")
        return train

    @cached_property
    def val(self) -> Split | None:
        return split(self.patient, "val")

    @cached_property
    def door(self) -> Entrance:
        return entrance(self.patient)

    @property
    def whole(self) -> bool:
        """Whether the batches kept are about an epoch (one in ten may be held back for validation)."""
        return len(self.patient.train) >= 0.85 * self.patient.batches

    def findings(self) -> list[Finding]:
        found = input_findings(self.train, self.val, self.door)
        found += label_findings(self.train, self.val, self.patient.num_classes, self.whole)
        if self.val is not None and not any(f.disease == "constant_inputs" and f.certain for f in found):
            found += twin_findings(self.train, self.val)
        return list(ordered(found))

    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = {"inputs": inputs_seen(self.train, self.door), "labels": labels_seen(self.train)}
        return seen if self.val is None else seen | {"twins": twins_seen(self.train, self.val)}


def data_findings(patient: Patient) -> list[Finding]:
    """Diseases of the patient's data, the gravest first; nothing is trained and nothing is changed.

    Certain findings need no trial; suspicions (certain=False) are to be borne out by one. Raises InputError where there
    is no training batch or the model fails on the first one.
    """
    return Data(patient).findings()


def data_seen(patient: Patient) -> dict[str, Any]:
    """The numbers behind `data_findings` as plain data, healthy or not."""
    return Data(patient).seen()

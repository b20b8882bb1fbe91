"""Diseases of the data: what images and labels show before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from knep.doctor.data.baseline_accuracy import Reference, compared
from knep.doctor.data.first_layer import Entrance, entrance
from knep.doctor.data.inputs import input_findings, inputs_seen
from knep.doctor.data.label_noise import relation_findings, relation_seen
from knep.doctor.data.labels import label_findings, labels_seen
from knep.doctor.data.leakage import Twins, twin_findings, twins, twins_seen
from knep.doctor.data.shift import Drift, drift, drift_findings, drift_seen
from knep.doctor.data.split_view import Split, split
from knep.doctor.findings import Finding, ordered
from knep.doctor.subject.setup import Patient
from knep.errors import InputError


@dataclass(frozen=True)
class Data:
    """Both splits of a patient, looked at once; nothing is trained and nothing is changed.

    Raises InputError where there is no training batch or the model fails on the first one.
    """

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

    @cached_property
    def reference(self) -> Reference | None:
        return None if self.val is None else compared(self.train, self.val, self.patient.num_classes)

    @cached_property
    def twins(self) -> Twins | None:
        return None if self.val is None else twins(self.train, self.val)

    @cached_property
    def drift(self) -> Drift | None:
        return None if self.val is None or not len(self.train) or not len(self.val) else drift(self.train, self.val)

    @property
    def whole(self) -> bool:
        """Whether the batches kept are about an epoch (one in ten may be held back for validation)."""
        return len(self.patient.train) >= 0.85 * self.patient.batches

    def findings(self) -> list[Finding]:
        """The gravest first; suspicions (certain=False) are to be borne out by a trial."""
        found = input_findings(self.train, self.val, self.door)
        found += label_findings(self.train, self.val, self.patient.num_classes, self.whole)
        if self.val is not None and self.twins is not None and not _has(found, "constant_inputs"):
            moved = drift_findings(self.drift, len(self.val))
            found += twin_findings(self.twins, self.train, self.val) + moved
            if not _has(found, "constant_labels", "labels_off_by_one", "labels_out_of_range"):
                found += self._between(foreign=_has(moved, "validation_scaled_differently"))
        return list(ordered(found))

    def _between(self, foreign: bool) -> list[Finding]:
        """What only both splits together show."""
        r = self.reference
        return [] if r is None else relation_findings(r, len(self.train.y.unique()), foreign)

    def seen(self) -> dict[str, Any]:
        """The numbers behind the findings as plain data, healthy or not."""
        seen: dict[str, Any] = {"inputs": inputs_seen(self.train, self.door), "labels": labels_seen(self.train)}
        if self.twins is not None:
            seen |= {"twins": twins_seen(self.twins), "drift": drift_seen(self.drift)}
        return seen if self.reference is None else seen | {"reference": relation_seen(self.reference)}


def _has(found: list[Finding], *diseases: str) -> bool:
    return any(f.certain and f.disease in diseases for f in found)

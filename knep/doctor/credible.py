"""What of an examination made for images holds for subjects of any form, and for a run whose length nobody gave."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import DataLoader, WeightedRandomSampler

from knep.doctor.checks import splits
from knep.doctor.checks.probe import probe
from knep.doctor.findings import Finding, Report
from knep.doctor.subject.any_batch import first
from knep.doctor.subject.any_task import Subject

_MARGIN = 0.1  # of accuracy, by which a trial disproves what simple classifiers say
_LITTLE = 8.0  # points of accuracy that more of the same training may gain
_LENGTH = {"lr_too_low", "no_decay", "stopping_too_early"}


def credible(subject: Subject, report: Report) -> list[Finding]:
    """The findings of a report without those that the trial, the form of the data or the loss disproves."""
    return [f for f in report.findings if not _disproved(subject, report, f)]


def _disproved(subject: Subject, report: Report, f: Finding) -> bool:
    if f.disease == "unrelated_labels":
        return _learned(report)
    if f.disease == "leaked_validation":
        return _by_chance(subject)
    if f.disease == "constant_inputs":
        return _few_values(subject, report)
    if f.disease == "class_imbalance":
        return _weighed(subject)
    if f.disease in _LENGTH and subject.guessed_length and f.gain is not None:
        return f.disease == "stopping_too_early" or f.gain < _LITTLE
    return False


def _learned(report: Report) -> bool:
    """Whether the trial learned more of validation than the classifiers that found no relation."""
    curve = report.measured.get("trial", {}).get("curve", ())
    simple = report.measured.get("data", {}).get("reference", {}).get("acc")
    return bool(curve) and simple is not None and max(acc for _, _, acc in curve) > simple + _MARGIN


def _by_chance(subject: Subject) -> bool:
    """Whether rows of few different values coincide as often as their counts foretell."""
    x = first(subject.parts(subject.train[0])[0])
    if x is None or (x.is_floating_point() and x.ndim > 2):
        return False
    return not splits.leaked(subject)


def _few_values(subject: Subject, report: Report) -> bool:
    """Whether rows that are no images only happen to be equal, as short ones of few values are."""
    x = first(subject.parts(subject.train[0])[0])
    distinct = report.measured.get("data", {}).get("inputs", {}).get("distinct", 0.0)
    return x is not None and x.ndim != 4 and distinct > 0.01


def _weighed(subject: Subject) -> bool:
    """Whether rare classes are weighed already: by the sampler, or by a loss whose slope is larger for them."""
    loader = subject.loaders[0]
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, WeightedRandomSampler):
        return True
    seen = subject.stacked("train")
    p = probe(subject, rows=128)
    if seen is None or p.y is None or p.y.ndim != 1 or not p.judged:
        return False
    often = seen[1].long().clamp(min=0).bincount()
    slope = p.slope(0 * p.scores).flatten(1).norm(dim=1)
    usual = slope[p.y == int(often.argmax())]
    rare = slope[[int(often[k]) * 4 < int(often.max()) for k in p.y.tolist()]]
    return len(rare) > 0 and len(usual) > 0 and float(rare.mean()) > 1.5 * float(Tensor.mean(usual))

"""What an examination finds: findings in order of gravity, and the report that holds them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

_TABLE = Path(__file__).with_name("diseases.yaml")


@dataclass(frozen=True)
class Disease:
    """A row of diseases.yaml.

    kind: data, model, optimisation or regularization; title: in words; cause: what is wrong and why it hurts;
    source: the paper; overrides: what would mend it, one group of override lines per way; mend: what the user does
    where no override can; usual, running: what a cure tries as well, and what can be changed in a run that goes on;
    seen: where it shows, in an examination, only beside a loop, in the curves of a run that has ended, or by timing.
    """

    name: str
    kind: str
    title: str
    cause: str
    source: str
    overrides: tuple[tuple[str, ...], ...] = ()
    mend: str = ""
    usual: tuple[tuple[str, ...], ...] = ()
    running: str = ""
    seen: str = "examination"


@lru_cache
def diseases() -> Mapping[str, Disease]:
    """Name -> disease, for every disease that the doctor knows."""
    import yaml

    rows = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    for row in rows.values():
        row |= {key: tuple(tuple(way) for way in row.get(key, ())) for key in ("overrides", "usual")}
    return {name: Disease(name, **row) for name, row in rows.items()}


@dataclass(frozen=True)
class Finding:
    """One disease, with what shows it.

    disease: a name of diseases.yaml; evidence: numbers and layers, in one or two sentences; gravity: in [0, 1], how
    much of the training it costs and how sure that is, the order of the report; certain: True where the evidence alone
    makes the patient sick, False for a suspicion that a trial has to bear out; layers: paths of modules or parameters;
    overrides: the prescription, one group of lines per way, the best first; mend: what the user does where no
    override can; began: the training step at which a live finding began; gain: validation accuracy in points that a
    trial of the prescription gained, None where none was made.
    """

    disease: str
    evidence: str
    gravity: float
    certain: bool = True
    layers: tuple[str, ...] = ()
    overrides: tuple[tuple[str, ...], ...] = ()
    mend: str = ""
    began: int | None = None
    gain: float | None = None

    @property
    def about(self) -> Disease:
        return diseases()[self.disease]

    @property
    def gained(self) -> str:
        """What a trial gained, in words."""
        how = "with the first" if self.overrides else "once it is mended"
        return f"{self.gain:+.1f} points of validation accuracy {how}"

    def prescribed(self, *ways: Sequence[str]) -> Finding:
        """The same finding with these ways of mending it; a way without lines is one that only the user can go."""
        return replace(self, overrides=tuple(tuple(way) for way in ways if way))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        about = self.about
        row = {
            "disease": self.disease,
            "kind": about.kind,
            "title": about.title,
            "gravity": round(self.gravity, 4),
            "evidence": self.evidence,
            "layers": list(self.layers),
            "cause": about.cause,
            "source": about.source,
            "overrides": [list(way) for way in self.overrides],
            "mend": self.mend,
        }
        if self.began is not None:
            row["began"] = self.began
        return row | ({} if self.gain is None else {"gain": round(self.gain, 2)})


@dataclass(frozen=True)
class Report:
    """The outcome of an examination. str(report) is what the terminal shows.

    findings: the gravest first; measured: what was measured, healthy or not, as plain data for figures and JSON;
    seconds: the examination took; notes: what could not be examined, and why; sound: what no finding means; unknown:
    why nothing can be told; unit: what `began` counts.
    """

    findings: tuple[Finding, ...]
    measured: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    sound: str = "nothing found that keeps this network from learning"
    unknown: str = ""
    unit: str = "step"

    @property
    def sick(self) -> bool:
        return bool(self.findings)

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.findings and self.unknown:
            return f"too little to tell: {self.unknown}"
        if not self.findings:
            return f"healthy: {self.sound}"
        more = len(self.findings) - 1
        return f"sick: {self.findings[0].about.title}" + (f", and {more} more" if more else "")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "verdict": self.verdict,
            "sick": self.sick,
            "findings": [f.as_dict() for f in self.findings],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
            "measured": dict(self.measured),
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.text import Text

        from knep.utils.text import shown

        console = Console(file=io.StringIO(), width=110, highlight=False, markup=False, emoji=False)
        console.print(Text(self.verdict, style="bold"))
        for number, finding in enumerate(self.findings, 1):
            began = "" if finding.began is None else f" (since {self.unit} {finding.began})"
            console.print(f"\n{number}. {finding.about.title}{began}")
            rows = [("evidence", finding.evidence), ("cause", finding.about.cause), ("source", finding.about.source)]
            rows += [("try" if i == 0 else "or", " ".join(way)) for i, way in enumerate(finding.overrides)]
            rows += [("mend", finding.mend)] if finding.mend else []
            if finding.gain is not None:
                rows.append(("trial", finding.gained))
            for word, text in rows:
                console.print(f"   {word:9}{shown(text)}", soft_wrap=True)
        for note in self.notes:
            console.print(f"\nnote: {shown(note)}", soft_wrap=True)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().strip()

    __repr__ = __str__


def ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The gravest first, one for each disease."""
    best: dict[str, Finding] = {}
    for finding in findings:
        if finding.disease not in best or finding.gravity > best[finding.disease].gravity:
            best[finding.disease] = finding
    return tuple(sorted(best.values(), key=lambda f: -f.gravity))


def finding(
    disease: str, evidence: str, gravity: float, began: int | None = None, *, layers: Sequence[str] = (), **more: Any
) -> Finding:
    """With what the table prescribes, unless `more` has overrides or a mend of its own; gravity is cut to [0, 1]."""
    if not more.keys() & {"overrides", "mend"}:
        more |= {"overrides": diseases()[disease].overrides, "mend": diseases()[disease].mend}
    return Finding(disease, evidence, min(1.0, max(0.0, gravity)), layers=tuple(layers), began=began, **more)


def named(paths: Sequence[str]) -> str:
    """One or two paths in full, of more the first, the last and how many."""
    unique = list(dict.fromkeys(paths))
    if len(unique) <= 2:
        return " and ".join(unique)
    return f"{unique[0]} to {unique[-1]} ({len(unique)} layers)"


def share(value: float) -> str:
    """A share in percent, without rounding what is not all to all."""
    text = f"{value:.1%}"
    return "over 99.9%" if text == "100.0%" and value < 1 else text.replace(".0%", "%")


def row(values: Tensor) -> str:
    """Numbers by channel (C,), of more than four the first ones."""
    return "/".join(f"{v:.3g}" for v in values[:4].tolist()) + ("/..." if len(values) > 4 else "")


# Cause -> what follows from it: where both are found, what follows ranks below.
_BRINGS: Mapping[str, tuple[str, ...]] = {
    "non_finite_inputs": ("lr_too_high", "exploding_gradient", "loss_spikes", "momentum_instability"),
    "constant_inputs": ("signal_collapse", "lr_too_low"),
    "constant_labels": ("lr_too_low", "vanishing_gradient"),
    "unscaled_inputs": ("exploding_gradient", "lr_too_high", "dying_relu", "saturation", "stale_statistics"),
    "stale_statistics": ("overfitting",),
    "symmetric_weights": ("signal_collapse", "vanishing_gradient", "dying_relu", "lr_too_low"),
    "exploding_gradient": ("lr_too_high", "dying_relu", "saturation", "loss_spikes"),
    "saturation": ("vanishing_gradient", "lr_too_low"),
    "vanishing_gradient": ("lr_too_low", "signal_collapse"),
    "dying_relu": ("signal_collapse", "vanishing_gradient", "cut_off"),
    "momentum_instability": ("lr_too_high", "dying_relu", "saturation", "loss_spikes"),
    "lr_too_high": (
        "lr_too_low",
        "stale_statistics",
        "dying_relu",
        "saturation",
        "loss_spikes",
        "signal_collapse",
        "vanishing_gradient",
        "no_decay",
    ),
    "clip_throttles": ("lr_too_low",),
    "cut_off": ("lr_too_low",),
    "frozen_parameters": ("lr_too_low",),
    "sorted_batches": ("dying_relu", "lr_too_high", "loss_spikes", "no_decay", "stale_statistics"),
    "loss_spikes": ("dying_relu", "signal_collapse", "saturation"),
    "weight_decay_too_large": ("lr_too_high", "signal_collapse", "vanishing_gradient", "lr_too_low", "dying_relu"),
    "precision_underflow": ("lr_too_low",),
    "double_softmax": ("lr_too_low", "vanishing_gradient"),
    "gradients_add_up": (
        "lr_too_high",
        "momentum_instability",
        "loss_spikes",
        "dying_relu",
        "saturation",
        "overfitting",
    ),
    "foreign_optimizer": ("lr_too_low", "cut_off"),
    "detached_loss": ("lr_too_low", "cut_off"),
    "gradients_dropped": ("lr_too_low", "cut_off", "clip_throttles"),
    "eval_mode_in_training": ("stale_statistics",),
}


def line(finding: Finding) -> str:
    """A finding in one line."""
    return f"doctor: since step {finding.began}: {finding.about.title}: {finding.evidence}"


def ranked(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The gravest first; what follows from another finding behind it."""
    found = {f.disease: f for f in findings}
    for cause, effects in _BRINGS.items():
        for effect in effects:
            if cause in found and effect in found and (found[cause].began or 0) <= (found[effect].began or 0) + 20:
                below = min(found[effect].gravity, 0.8 * found[cause].gravity)
                found[effect] = replace(found[effect], gravity=below)
    if any(f.certain for f in found.values()):
        found.pop("no_decay", None)  # what swings has a better reason
    return ordered(list(found.values()))

"""Live findings in order: what follows from another disease ranks behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from knep.doctor.findings import Finding, ordered

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

"""The diseases of a model that one pass at the start, a few plain steps and the layers' settings show."""

from __future__ import annotations

from dataclasses import replace

from knep.doctor.data.first_layer import entrance
from knep.doctor.findings import Finding, ordered
from knep.doctor.model.batch_norm import batch_norms
from knep.doctor.model.gradient_flow import cut_off, frozen
from knep.doctor.model.output_layer import double_softmax, narrow
from knep.doctor.model.precision import precision
from knep.doctor.model.propagation import propagation
from knep.doctor.model.rectified import rectified
from knep.doctor.model.sgd_steps import stepped
from knep.doctor.model.signal_pass import signals
from knep.doctor.model.symmetry import symmetric
from knep.doctor.model.unregistered import unregistered
from knep.doctor.subject.setup import Patient
from knep.observe.rows import Signals

_SCALED = (0.2, 5.0)  # deviation of inputs whose size does not matter for the layers behind


def model_findings(patient: Patient, seen: Signals) -> list[Finding]:
    """The gravest first, one for each disease: certain ones, which are bugs, and suspicions for a trial to bear out."""
    after = stepped(patient)
    later = signals(patient, after)
    found = [
        *double_softmax(patient, seen),
        *rectified(patient, seen),
        *cut_off(patient, seen, later),
        *unregistered(patient),
        *frozen(patient.model, seen),
        *symmetric(patient.model, after, seen),
        *batch_norms(patient, seen),
        *precision(patient),
        *narrow(patient, seen),
    ]
    return list(ordered([*found, *_passing(patient, seen, later, after)]))


def _passing(patient: Patient, seen: Signals, later: Signals, after: object) -> list[Finding]:
    """Propagation where the layers are to blame, which a few steps do not mend, as they do blocks that start at zero;
    what only inputs of an odd size cause is a faint suspicion."""
    state = later if _asleep(seen) else seen
    lasting = {f.disease for f in propagation(later)}
    raw = [f for f in propagation(state) if f.disease in lasting]
    if _of_a_size(patient, seen):
        return raw
    own = propagation(signals(patient, after if state is later else None, standardized=True))  # pyright: ignore
    named = {f.disease for f in own}
    return own + [replace(f, certain=False, gravity=0.4 * f.gravity) for f in raw if f.disease not in named]


def _of_a_size(patient: Patient, seen: Signals) -> bool:
    """Whether the size of the inputs is no matter: near 1, made so by the model itself, or of indices, without any."""
    door = entrance(patient)
    mean, std = seen.input_mean, seen.input_std
    if door.own and door.x is not None and door.x.numel() > 1:
        mean, std = float(door.x.mean()), float(door.x.std())
    return door.tokens or (_SCALED[0] < std < _SCALED[1] and abs(mean) < _SCALED[1])


def _asleep(seen: Signals) -> bool:
    """Whether the last layer starts at zero, so that no gradient passes it as yet."""
    return bool(seen.linear) and seen.linear[-1].scale == 0

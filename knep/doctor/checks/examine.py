"""All checks that need no training, in order; what one cannot read, it leaves to the others."""

from __future__ import annotations

from collections.abc import Callable

from knep.doctor.checks import alignment, gradients, ignored, loaders, loss, modes, rows, shapes, splits, targets
from knep.doctor.checks.probe import Probe, probe
from knep.doctor.findings import Finding
from knep.doctor.subject.any_task import Subject
from knep.doctor.subject.rng_isolation import undisturbed
from knep.errors import InputError

# Of the loss, the output and the inputs, on a few rows.
_PROBED: tuple[Callable[[Probe], list[Finding]], ...] = (
    shapes.broadcast,
    shapes.scrambled,
    rows.unstable,
    rows.mixed,
    rows.future,
    modes.modes,
    modes.norms,
    loss.squashed,
    loss.reach,
    loss.inverted,
    targets.out_of_range,
    targets.no_probabilities,
    ignored.reads_padding,
)
_WHOLE: tuple[Callable[[Subject], list[Finding]], ...] = (
    gradients.detached,
    gradients.without_weight,
    gradients.ownership,
    gradients.not_finite,
    ignored.ignored,
    loaders.random_validation,
    loaders.repeated_noise,
    targets.leaked_target,
    targets.one_row_off,
)
# The same questions that the examination of images asks in its own way.
_OTHER_TASKS: tuple[Callable[[Subject], list[Finding]], ...] = (
    targets.sorted_rows,
    splits.scales,
    splits.leaked,
    alignment.misaligned,
)
_OF_A_MODEL = (gradients.left_out,)


def checked(subject: Subject, images: bool) -> tuple[list[Finding], list[str]]:
    """(findings, notes on checks that could not be made). images: the examination of images follows.

    Raises InputError where the model or the loss fails on its data.
    """
    first = loaders.repeated_rows(subject) or ([] if images else targets.numbers(subject))
    if first:
        return first, []
    with undisturbed(subject.seed, *subject.loaders):
        try:
            subject.passed(subject.copy(), subject.train[0])
        except InputError:
            if images:  # it says what is wrong with labels that no loss takes
                return first, []
            out = targets.out_of_range(probe(subject))
            if out:
                return out, []
            raise
    found, notes = list(first), []
    p = probe(subject)
    todo = [(check, p) for check in _PROBED] + [(check, subject) for check in _WHOLE]
    if not images:
        todo += [(check, subject) for check in (*_OF_A_MODEL, *_OTHER_TASKS)]
    for check, asked in todo:
        try:
            with undisturbed(subject.seed, *subject.loaders):
                found += check(asked)  # pyright: ignore[reportArgumentType]
        except InputError:
            raise
        except Exception as error:  # code of another project runs in each of them
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            notes.append(f"the check {check.__name__} could not be made: {text}")
    return found, notes

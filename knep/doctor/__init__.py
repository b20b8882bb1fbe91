"""The doctor: says why a network does not learn, prescribes overrides, and proves the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knep.doctor.findings import Report
    from knep.doctor.live.watch import Watch


def examine(model: Any, train: Any, val: Any = None, *, optimizer: Any, **how: Any) -> Report:
    """Why `model` does not learn from the batches (x, y) of `train` with `optimizer`; nothing is changed.

    how: as `knep.doctor.subject.setup.of` takes it: loss, num_classes, epochs, clip, seed. Raises InputError for what
    is no classifier of images, or fails on its data.
    """
    from knep.doctor.diagnose import diagnose
    from knep.doctor.subject.setup import of

    return diagnose(of(model, train, val, optimizer=optimizer, **how))


def watch(model: Any, optimizer: Any, *, every: int = 10, on_finding: Any = "warn") -> Watch:
    """The doctor beside a loop of one's own; see `knep.doctor.live.watch.watch`."""
    # Imported here, so that `import knep` costs nothing.
    from knep.doctor.live.watch import watch as live

    return live(model, optimizer, every=every, on_finding=on_finding)

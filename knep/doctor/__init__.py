"""The doctor: says why a network does not learn, prescribes overrides, and proves the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knep.doctor.live import Watch


def watch(model: Any, optimizer: Any, *, every: int = 10, on_finding: Any = "warn") -> Watch:
    """The doctor beside a loop of one's own; see `knep.doctor.live.watch`."""
    # Imported here, so that `import knep` costs nothing.
    from knep.doctor.live import watch as live

    return live(model, optimizer, every=every, on_finding=on_finding)

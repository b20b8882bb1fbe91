"""What a run leaves, for comparing two runs to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def _leaves(value: Any, folder: Path, path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested plain data as (path, leaf), with the run folder's own name left out."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _leaves(v, folder, f"{path}/{k}".replace(str(folder), ""))
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from _leaves(v, folder, f"{path}/{i}")
    else:
        yield path, value.replace(str(folder), "") if isinstance(value, str) else value


def traces(folder: Path) -> dict[str, Any]:
    """All that a run left that must not depend on interruptions: path -> tensor, number or text."""
    kept: dict[str, Any] = {}
    for place in sorted(folder.glob("member_*")) or [folder]:
        kept[f"{place.name}/metrics.csv" if place != folder else "metrics.csv"] = (place / "metrics.csv").read_text()
        for name in ("final", "best", "last"):
            state = torch.load(place / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True)
            state.pop("knep")  # the config, in which `ckpt` differs
            kept.update(_leaves(state, folder.resolve(), name if place == folder else f"{place.name}/{name}"))
    return kept


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """ "identical", or the first trace that differs and by how much."""
    for path in dict.fromkeys([*a, *b]):
        if path not in a or path not in b:
            return f"differs: {path} is in one only"
        x, y = a[path], b[path]
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if x.shape != y.shape or not torch.equal(x, y):
                far = (x.double() - y.double()).abs().max().item() if x.shape == y.shape else float("inf")
                return f"differs by {far:.3g}: {path}"
        elif x != y:
            return f"differs: {path}" + (f", {x} and {y}" if len(str(x)) < 40 else "")
    return "identical"

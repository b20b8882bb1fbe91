"""What a run leaves, for comparing two runs to the bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from knep.engine.logging.tensorboard import WHOLE


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


_TIMED = ("seconds", "samples_per_second")  # and how often the test split was read, which a kill may add to
# The doctor begins to watch anew in each life of a run, and finds what it sees there.
_OF_DOCTOR = ("/callbacks/Doctor/", "summary.json/findings", "tensorboard/doctor/")
_EVENTS = "events.out.tfevents"
_LOG = "train.log"  # each life says what it printed


def left(folder: Path) -> dict[str, Any]:
    """All that a run of the command left in its folder, by file, without times: path -> tensor, number or text."""
    kept: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _LOG):
        if path.name.startswith(_EVENTS):
            continue
        name = str(path.relative_to(folder))
        if path.suffix in (".ckpt", ".pt"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if "knep" in state:
                state["knep"]["config"].pop("ckpt")
            kept.update(_leaves(state, folder.resolve(), name))
        elif path.name == "summary.json":
            kept.update(_leaves({k: v for k, v in _summary(path).items() if k not in _TIMED}, folder, name))
        else:
            lines = path.read_text().replace(str(folder), "").splitlines()
            kept[name] = [line for line in lines if not line.startswith("ckpt")]
    for place in folder.glob("**/tensorboard"):
        kept.update(_leaves(_points(place), folder, str(place.relative_to(folder))))
    return {path: leaf for path, leaf in kept.items() if not any(word in path for word in _OF_DOCTOR)}


def _summary(path: Path) -> dict[str, Any]:
    summary = json.loads(path.read_text())
    return summary | {"sealed": min(summary["sealed"], 1)} if "sealed" in summary else summary


def _points(folder: Path) -> dict[str, Any]:
    """What TensorBoard shows of a folder: the steps and values of scalars, the steps of pictures and texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of points that a later life replaced
    seen = EventAccumulator(str(folder), dict.fromkeys(("scalars", "images", "tensors"), 0)).Reload()
    tags: Any = seen.Tags()
    scalars = {tag: [(e.step, e.value) for e in seen.Scalars(tag)] for tag in tags["scalars"]}
    timed = {f"{WHOLE}/{name}" for name in _TIMED}
    shown = {tag: [e.step for e in seen.Images(tag)] for tag in tags["images"]}
    texts = {tag: sorted({e.step for e in seen.Tensors(tag)}) for tag in tags["tensors"]}
    return {tag: values for tag, values in (scalars | shown | texts).items() if tag not in timed}


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

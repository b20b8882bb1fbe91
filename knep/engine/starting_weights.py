"""What weights that a model starts from ask of the rest of its run: the input's scale, norms and activations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from knep.config.schema import DataSpec, RunConfig
from knep.engine.any_module.part import edits_of, function_of
from knep.errors import InputError
from knep.models.pretrained import Loaded, Source, fill
from knep.optim.thawing import layers_of
from knep.recipes import scaling as scalings
from knep.recipes.recipe import Recipe, Report
from knep.surgery.sample import Inputs
from knep.utils.text import shown


def load_into(
    model: nn.Module, source: Source, run: RunConfig, report: Report, sample: Inputs
) -> tuple[Loaded, list[str]]:
    """Lays the source into a model that the recipe has edited; lines on what differs from the run that made it.

    Raises InputError as `fill` does, and where the recipe puts norms that the source was not trained with.
    """
    loaded = fill(model, source, layers_of(model, sample=sample).head)
    norms = [change.path for change in edits_of(report.changes.get("norm", []))]
    _refuse_norms(model, source, run, norms)
    return loaded, [*loaded.said, *_of_activations(source, run, report)]


def _refuse_norms(model: nn.Module, source: Source, run: RunConfig, norms: Sequence[str]) -> None:
    """norms: paths at which the recipe has put one."""
    theirs, ours = source.config.get("norm"), run.slots["norm"]
    own = model.state_dict()
    statistics = {name for name in source.weights if name.endswith(".running_mean") and name not in own}
    if theirs == ours or not (norms or statistics):
        return
    if isinstance(theirs, Mapping):
        raise InputError(
            f"norm={_option(ours)} contradicts model.weights={shown(source.name)}, whose norms are those of "
            f"norm={_option(theirs)}: write norm={_option(theirs)}, with its values"
        )
    if statistics:
        raise InputError(
            f"norm={_option(ours)} has no place for {min(statistics)} of model.weights={shown(source.name)}: write "
            "norm=none, or norm=batch where the model leaves its norms to the recipe"
        )
    lacking = [path for path in norms if f"{path}.running_mean" not in source.weights]
    if lacking:
        raise InputError(
            f"norm={_option(ours)} puts another norm at {lacking[0]}, which model.weights={shown(source.name)} was not "
            "trained with: write norm=none"
        )


def _option(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_")).rpartition(".")[2]


def _of_activations(source: Source, run: RunConfig, report: Report) -> list[str]:
    theirs, ours = source.config.get("activation"), run.slots["activation"]
    if isinstance(theirs, Mapping) and theirs != ours:
        return [f"activation={_option(ours)} here, {_option(theirs)} where the weights were trained"]
    if theirs is None and edits_of(report.changes.get("activation", [])):
        return [f"activation={_option(ours)} takes the place of what the weights were trained with"]
    return []


def scale_as(source: Source, scaling: nn.Module, recipe: Recipe, spec: DataSpec) -> list[str]:
    """Gives scaling=standardize the numbers that the source was trained with; lines on that, or on a difference.

    A source of another number of channels gives their mean.
    """
    name = shown(source.name)
    shift, scale = getattr(scaling, "shift", None), getattr(scaling, "scale", None)
    if spec.words or not isinstance(shift, Tensor) or not isinstance(scale, Tensor):
        return []
    if source.scaling is None:
        return [f"inputs: {name} does not say how its own were scaled"]
    theirs = [_for_channels(t, spec.channels) for t in source.scaling]
    if not source.config:  # of pixels in 0..255, as libraries say it
        if spec.dtype != "uint8" and spec.bits is None:
            return [f"inputs: {name} was trained on pixels in 0..255, scaled by {_said(*theirs)}"]
        more = (2**spec.bits - 1) / 255 if spec.bits else 1.0
        theirs = [theirs[0] * more, theirs[1] / more]
    if function_of(recipe.make_scaling) is scalings.standardize:
        with torch.no_grad():
            shape = (1, -1, 1, 1)
            scaling.shift, scaling.scale = (t.float().reshape(shape).clone() for t in theirs)
        return [f"inputs: scaled as those of {name}, by {_said(*theirs)}"]
    ours = [_for_channels(t.flatten(), spec.channels) for t in (shift, scale)]
    if all(torch.allclose(a.double(), b.double(), rtol=1e-3) for a, b in zip(ours, theirs, strict=True)):
        return []
    return [
        f"inputs: scaled by {_said(*ours)}, and {name} was trained with {_said(*theirs)}: write scaling=standardize to "
        "take that"
    ]


def _for_channels(values: Tensor, channels: int) -> Tensor:
    flat = values.flatten()
    return flat if len(flat) == channels else flat.mean().expand(channels)


def _said(shift: Tensor, scale: Tensor) -> str:
    if len(shift) == 1 or (bool((shift == shift[0]).all()) and bool((scale == scale[0]).all())):
        return f"(x - {float(shift[0]):.4g}) / {1 / float(scale[0]):.4g}"
    return f"(x - {_list(shift)}) / {_list(1 / scale)}"


def _list(values: Collection[float] | Tensor) -> str:
    return f"[{', '.join(f'{float(v):.4g}' for v in list(values)[:4])}{', ...' if len(values) > 4 else ''}]"

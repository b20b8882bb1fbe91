"""A trained model as plain torch has it: folded, under plain names, with the facts that another program needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torchvision.models import get_model

from knep.config.instantiate import instantiate
from knep.config.schema import DataSpec, RunConfig
from knep.engine.module import Classifier
from knep.errors import InputError, named
from knep.models.torchvision import builder_options
from knep.recipes.init import builds
from knep.surgery.edit import bare, replace
from knep.tasks.regression import Regression
from knep.version import __version__

TOLERANCE = 1e-4
_IMAGES = 64
_ZOO = "knep.models.torchvision.torchvision"
_HYDRA = ("_target_", "_partial_", "_recursive_", "_convert_")


@dataclass(frozen=True)
class Portable:
    """A model that maps scaled images (N, C, H, W) to logits (N, K), and what to know about it as JSON-able data.

    pixels: raw images for checks, float32 (N, C, H, W) in 0..255; logits: what the run's own model says of them.
    """

    model: nn.Module
    scaling: nn.Module
    about: dict[str, Any]
    pixels: Tensor
    logits: Tensor

    def check(self, logits: Tensor, what: str) -> float:
        """The largest difference from the run's logits, as a share of their largest size (or of 1, if that is less).

        Raises InputError, naming `what`, where it is above 1e-4 or not a number.
        """
        size = max(1.0, self.logits[: len(logits)].abs().max().item())
        difference = (logits - self.logits[: len(logits)]).abs().max().item() / size
        if not difference <= TOLERANCE:
            raise InputError(
                f"{what} differs from the run's model by {difference:.2g}, more than {TOLERANCE}: not kept"
            )
        return difference


@torch.no_grad()
def portable(module: Classifier) -> Portable:
    """The plain model of a run: weight and spectral normalization folded, training-only layers (dropout) left out.

    Its steps of construction are run here and its weights loaded by name, so that what `about` says is what works.
    Raises InputError for weights that are not finite, or a model that its steps do not rebuild.
    """
    facts = module.about
    module.eval()
    pixels = check_images(facts)
    logits = module(pixels)
    if not logits.isfinite().all():
        raise InputError("the run's model gives logits that are not finite: export another checkpoint, or train again")
    plain, steps = _rebuild(facts, module.scaling)
    _take_state(plain, bare(module.model))
    found = Portable(plain.eval(), module.scaling, _about(facts, module, steps), pixels, logits)
    found.check(found.model(module.scaling(pixels)), "the model that its config rebuilds")
    return found


def check_images(facts: Mapping[str, Any]) -> Tensor:
    """64 images of random pixels, float32 (64, C, H, W) with whole values in 0..255, always the same.

    Of other rows: whole numbers of tokens int64 (64, L), or float32 from a normal distribution.
    """
    spec, draw = DataSpec.stored(facts), torch.Generator().manual_seed(0)
    shape = (_IMAGES, *spec.row)
    if spec.words:
        return torch.randint(0, spec.channels, shape, generator=draw)
    if spec.dtype != "uint8":
        return torch.randn(shape, generator=draw)
    return torch.randint(0, 256, shape, generator=draw).float()


def fold(model: nn.Module) -> None:
    """Turns each parametrization (weight or spectral normalization) into a plain tensor, in place."""
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", ())) if is_parametrized(module) else ():
            remove_parametrizations(module, name, leave_parametrized=True)


def _rebuild(facts: Mapping[str, Any], scaling: nn.Module) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A new model by a config's model, norm, activation and an init that builds, and the steps that made it."""
    cfg, spec = facts["config"], DataSpec.stored(facts)
    given = RunConfig.of(cfg).size(spec)
    with named("model"):
        model, steps = _model(RunConfig.of(cfg).model, given)
    sample = scaling(torch.zeros(1, *spec.row, dtype=torch.int64 if spec.words else torch.float32))
    for slot in ("norm", "activation", *(["init"] if builds(cfg["init"]["_target_"]) else [])):
        with named(slot):
            changes = instantiate(cfg[slot])(model, sample=sample)
        node = cfg[slot]
        if any(map(is_parametrized, model.modules())):
            fold(model.eval())
            node = _beside(node)
        elif not any(change.after != "kept" for change in changes):
            node = {}
        if node:
            edit = {"edit": node["_target_"], "arguments": _arguments(node)}
            steps.append(edit | {"sample": list(sample.shape)})
    return model, steps


def _beside(node: Mapping[str, Any]) -> dict[str, Any]:
    """The norm that stands beside folded weights, whose own edit is none any more: {} where there is none."""
    beside = node.get("beside", "none")
    groups = {"groups": node["groups"]} if beside == "group" else {}
    return {} if beside == "none" else {"_target_": f"knep.recipes.norm.{beside}", **groups}


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key not in _HYDRA}


def _model(node: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[nn.Module, list[dict[str, Any]]]:
    if node["_target_"] == _ZOO:
        return _torchvision(node.get("name", "resnet18"), given)
    step = {"call": node["_target_"], "arguments": _arguments(node) | dict(given)}
    return instantiate(node)(**given), [step]


def _torchvision(name: str, given: Mapping[str, Any]) -> tuple[nn.Module, list[dict[str, Any]]]:
    """torchvision's own model, with another first convolution where it does not read three channels."""
    arguments = {"num_classes": given["num_classes"], **builder_options(name, given["image_size"])}
    model = get_model(name, weights=None, **arguments)
    steps: list[dict[str, Any]] = [{"call": f"torchvision.models.{name}", "arguments": arguments}]
    path, conv = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if conv.in_channels != given["in_channels"]:
        own = {key: getattr(conv, key) for key in ("out_channels", "kernel_size", "stride", "padding")}
        sizes = {"in_channels": given["in_channels"], **own, "bias": conv.bias is not None}
        replace(model, path, nn.Conv2d(**sizes))
        steps.append({"put": "torch.nn.Conv2d", "at": path, "arguments": sizes})
    return model, steps


def _take_state(plain: nn.Module, trained: nn.Module) -> None:
    """Copies weights and buffers layer by layer, in order: dropout has none, and wraps a layer without moving it.

    Raises InputError where the layers are not the same.
    """
    ours, theirs = _layers(plain), _layers(trained)
    if [{k: v.shape for k, v in layer.items()} for layer in ours] != [
        {k: v.shape for k, v in layer.items()} for layer in theirs
    ]:
        raise InputError(f"the run's model has other layers than its config builds: {len(theirs)}, not {len(ours)}")
    for new, old in zip(ours, theirs, strict=True):
        for name, tensor in new.items():
            tensor.copy_(old[name])


def _layers(model: nn.Module) -> list[dict[str, Tensor]]:
    """The tensors that each module holds itself, of the modules that hold any; parametrized ones as they are used."""
    layers = []
    for path, m in model.named_modules():
        if "parametrizations" not in path.split("."):
            held = {**dict(m.named_parameters(recurse=False)), **dict(m.named_buffers(recurse=False))}
            # A copy of the model could not be folded instead: torch shares the class that holds the parametrization.
            used = {name: getattr(m, name) for name in getattr(m, "parametrizations", ())} if is_parametrized(m) else {}
            layers.append(held | used)
    return [tensors for tensors in layers if tensors]


_OUTPUTS = {
    "multiclass": "logits (N, classes)",
    "binary": "logit (N, 1) of the second class: its sigmoid is a probability",
    "multilabel": "logits (N, labels): their sigmoids are probabilities",
    "regression": "standardised numbers (N, targets): output * std + mean is in their own unit",
    "segmentation": "logits (N, classes, H, W)",
    "tokens": "logits (N, L, tokens), at each place of the next one",
    "tagging": "logits (N, L, tags)",
}


def _about(facts: Mapping[str, Any], module: Classifier, steps: list[dict[str, Any]]) -> dict[str, Any]:
    spec, task = DataSpec.stored(facts), module.task
    own = {} if task.name == "multiclass" else {"task": task.name}
    if isinstance(task, Regression):
        own |= {"target_mean": task.mean.tolist(), "target_std": task.std.tolist()}
    packages = {name.partition(".")[0] for step in steps for key, name in step.items() if key in ("call", "edit")}
    return {
        "knep": __version__,
        "architecture": {"steps": steps, "needs": sorted({"torch"} | packages)},
        "classes": facts["class_names"],
        "input": {
            "shape": ["N", *spec.row],
            **({"pixels": [0, 255]} if spec.dtype == "uint8" else {"dtype": spec.dtype}),
            "scaling": _scaling(facts, module.scaling),
        },
        **own,
        "output": _OUTPUTS.get(task.name, "what the model gives"),
    }


def _scaling(facts: Mapping[str, Any], scaling: nn.Module) -> dict[str, Any]:
    """Kind, and mean and std per channel of (pixels - mean) / std; null where the scaling is none of this form."""
    kind = facts["config"]["scaling"]["_target_"].rpartition(".")[2]
    shift, scale = getattr(scaling, "shift", None), getattr(scaling, "scale", None)
    if isinstance(scaling, nn.Identity):
        return {"kind": "none", "formula": "x", "mean": [0.0], "std": [1.0]}
    if not isinstance(shift, Tensor) or not isinstance(scale, Tensor):
        return {"kind": kind, "mean": None, "std": None}
    mean, std = (t.flatten().expand(facts["channels"]).tolist() for t in (shift, 1 / scale))
    return {"kind": kind, "formula": "(pixels - mean) / std", "mean": mean, "std": std}

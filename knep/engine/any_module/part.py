"""A network of a LightningModule under its recipe, and what can be asked of both."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.errors import InputError
from knep.optim.thawing import Tuning
from knep.recipes import augment, clip, finetune, optimizer, scaling, scheduler
from knep.recipes.recipe import Recipe, Report
from knep.recipes.regularization import Regularizer
from knep.surgery.edit import Change
from knep.tasks.batches import Reading


@dataclass
class Part:
    """A network of the module, the recipe that it is trained by, and what that did so far.

    path: as in `get_submodule`; None for the only one that holds parameters.
    """

    path: str | None
    recipe: Recipe
    report: Report | None = None
    tuning: Tuning | None = None
    optimizer: Optimizer | None = None
    scheduler: Any = None  # where it is stepped here, because nobody else does
    decayed: list[Tensor] = field(default_factory=list)
    steps: int = 0
    gradients: int = 0  # that were clipped: two a step with optimizer=sam
    clipped: Tensor | float = 0.0
    penalised: int = 0
    edited: int = 0
    augmented: int = 0
    smoothed: int = 0
    rates: tuple[float, float] = (0.0, 0.0)
    total: int | None = None  # steps that the schedule was made for; None for one without an end

    def anew(self) -> None:
        """Forgets what an earlier fit counted."""
        self.steps = self.gradients = self.penalised = self.edited = self.augmented = self.smoothed = 0
        self.clipped, self.rates, self.total = 0.0, (0.0, 0.0), None

    @property
    def model_slots(self) -> str:
        """The options that edit the network, in words that tell them apart."""
        slots = {**self.recipe.model_slots, "scaling": self.recipe.make_scaling}
        return "; ".join(f"{slot}={option(made)}" for slot, made in slots.items())

    @property
    def choices(self) -> dict[str, str]:
        """Of the slots that a checkpoint goes on with, in words that tell them apart."""
        recipe = self.recipe
        found = {**recipe.model_slots, "scaling": recipe.make_scaling, "optimizer": recipe.make_optimizer}
        found["scheduler"] = recipe.make_scheduler
        found |= {"finetune": recipe.finetune} if self.tunes else {}
        return {slot: option(made) for slot, made in found.items()}

    @property
    def schedules(self) -> bool:
        return function_of(self.recipe.make_scheduler) is not scheduler.none

    @property
    def tunes(self) -> bool:
        return function_of(self.recipe.finetune) is not finetune.none

    @property
    def clips(self) -> bool:
        return function_of(self.recipe.clip) is not clip.none

    @property
    def optimizes(self) -> bool:
        return function_of(self.recipe.make_optimizer) is not optimizer.none

    @property
    def edits(self) -> bool:
        return type(self.recipe.regularization).after_step is not Regularizer.after_step

    @property
    def scales(self) -> bool:
        return function_of(self.recipe.make_scaling) is not scaling.none

    @property
    def mixes(self) -> bool:
        return getattr(self.recipe.augment, "mixes", False)

    @property
    def repeats(self) -> bool:
        return getattr(self.recipe.augment, "repeats", False)

    @property
    def mixing(self) -> str:
        """The name of the option that mixes rows."""
        augment = self.recipe.augment
        mixing = next((stage for stage in getattr(augment, "stages", ()) if getattr(stage, "mixes", False)), augment)
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(mixing).__name__).lower()

    @property
    def augments(self) -> bool:
        return type(self.recipe.augment) is not type(augment.none())


def scale_input(made: nn.Module, net: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return (made(inputs[0]), *inputs[1:]) if inputs else None


def edits_of(changes: Sequence[Change]) -> list[Change]:
    """Those that changed something, of what a report lists."""
    return [change for change in changes if not change.after.startswith(("kept", "not reached", "left"))]


def option(function: Any) -> str:
    """A function with its values, in words."""
    values = getattr(function, "keywords", {})
    said = ", ".join(f"{key}={option(value) if callable(value) else value}" for key, value in sorted(values.items()))
    return f"{getattr(function_of(function), '__name__', type(function).__name__)}({said})"


def inputs_wanted(net: nn.Module) -> int:
    """Inputs that a network's forward asks for."""
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


_GRAPH = ("edge_index", "edge_attr", "edge_weight", "edges", "adj", "adjacency", "ptr", "senders", "receivers")
_BESIDE = ("box", "boxes", "bbox", "bboxes", "keypoints", "landmarks", "mask", "masks")


def refuse_left_behind(batch: Any, x: Tensor, target: Any) -> None:
    """Raises InputError for what lies on the image and would not move with it."""
    sequence = enumerate(batch) if isinstance(batch, (tuple, list)) else ()
    items = list(batch.items() if isinstance(batch, Mapping) else sequence)
    left = [
        str(key)
        for key, value in items
        if value is not x
        and value is not target
        and (
            str(key).lower() in _BESIDE
            or (isinstance(value, Tensor) and x.ndim == 4 and value.ndim > 2 and value.shape[-2:] == x.shape[-2:])
        )
    ]
    graph = [str(key) for key, _ in items if str(key).lower() in _GRAPH]
    if graph:
        raise InputError(
            f"augment= changes rows one by one, and {', '.join(graph)} of the batch ties them into a graph: write "
            "augment=none"
        )
    if left:
        raise InputError(
            f"augment= changes the image and not {', '.join(left)} of the batch: write augment=none, or name the one "
            'that moves along, batch=("image", "mask")'
        )


def refuse_more_rows(batch: Any, x: Tensor, target: Any) -> None:
    """Raises InputError for what says something of each row, and would not be repeated with it."""
    items = (
        batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, (tuple, list)) else ()
    )
    left = [
        str(key)
        for key, value in items
        if value is not x and value is not target and isinstance(value, (Tensor, list, tuple)) and len(value) == len(x)
    ]
    if left:
        raise InputError(
            f"augment=repeats repeats images and targets, and not {', '.join(left)} of the batch: leave repeats out"
        )


def refuse_scaled(recipe: Recipe, x: Tensor | None) -> None:
    """Raises InputError where a scaling of pixels in 0..255 would meet inputs that are none."""
    function = function_of(recipe.make_scaling)
    if x is None or function not in (scaling.unit, scaling.symmetric) or not x.is_floating_point():
        return
    low, high = float(x.min()), float(x.max())
    if low < 0 or high <= 1 or high > 255:
        raise InputError(
            f"scaling={function.__name__} is for pixels in 0..255, and the inputs lie in {low:.3g}..{high:.3g}: write "
            "scaling=none or scaling=standardize"
        )


def described(target: Any) -> str:
    return (
        f"{target.dtype} {tuple(target.shape)}".removeprefix("torch.") if isinstance(target, Tensor) else "of no tensor"
    )


def is_batch(sample: Any, reading: Reading) -> bool:
    """Whether a sample is a batch with a target, of which the network reads the input alone."""
    try:
        x, target = reading.split(sample)
    except InputError:
        return False
    return isinstance(x, Tensor) and isinstance(target, Tensor)


def optimizers_of(made: Any) -> tuple[list[Optimizer], list[Any]]:
    """Optimizers and schedulers of what a configure_optimizers returns."""
    if isinstance(made, Optimizer):
        return [made], []
    if isinstance(made, Mapping):
        return [made["optimizer"]], [made["lr_scheduler"]] if made.get("lr_scheduler") else []
    if isinstance(made, (list, tuple)):
        if len(made) == 2 and all(isinstance(part, (list, tuple)) for part in made):
            return list(made[0]), list(made[1])
        parts = [optimizers_of(part) for part in made]
        return [o for optimizers, _ in parts for o in optimizers], [s for _, schedulers in parts for s in schedulers]
    return [], []


def function_of(made: Any) -> Any:
    return getattr(made, "func", made)


def name_of(module: LightningModule) -> str:
    return type(module).__name__


def networks(module: LightningModule) -> list[str]:
    """The children that hold parameters."""
    return [name for name, child in module.named_children() if any(True for _ in child.parameters())]


def network(module: LightningModule, path: str | None) -> nn.Module | None:
    """The network at a path, "" for the module itself; None where it is not there (yet), or not the only one."""
    if path is None:
        there = networks(module)
        return module.get_submodule(there[0]) if len(there) == 1 else None
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def parameters_of(module: LightningModule, path: str | None) -> list[nn.Parameter]:
    net = network(module, path)
    return [] if net is None else list(net.parameters())


def unknown(module: LightningModule, path: str | None) -> str:
    there = networks(module)
    said = " or ".join(f'model="{name}"' for name in there) or "a network into one of its attributes"
    if path is None:
        return f"{name_of(module)} has {len(there)} networks: name the one that the recipe acts on, {said}"
    return f'{name_of(module)} has no network "{path}": write {said}'


def few(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} are"

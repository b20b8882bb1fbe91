"""The dry run of a recipe: what it would do to a model, parameter by parameter and layer by layer, found on a copy."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from knep.errors import InputError
from knep.recipes.recipe import Recipe
from knep.surgery.check_forward import probe
from knep.surgery.edit import Change, bare
from knep.utils.text import console, shown

_SHAPES = ("norm", "activation", "dropout")


@dataclass(frozen=True)
class Parameter:
    """One parameter of the changed model, and what the recipe has for it.

    init: the rule and what it drew, or "kept"; decay: weight decay, 0 by rule for norms and biases; lr: learning rate
    of its group; multiplier: lr over the largest of its arm; arm: the update rule that steps it, or "frozen".
    """

    name: str
    shape: tuple[int, ...]
    init: str
    decay: float
    lr: float
    multiplier: float
    arm: str


@dataclass(frozen=True)
class Plan:
    """What a recipe would do. str(plan) is a table.

    layers: slot -> layers replaced or inserted; refused: slot -> why it cannot be done, which `apply` would raise.
    """

    parameters: list[Parameter]
    layers: Mapping[str, list[Change]]
    refused: Mapping[str, str]

    def __str__(self) -> str:
        return _text([_layers(self.layers), _parameters(self.parameters)], self.refused)

    __repr__ = __str__


def plan(recipe: Recipe, model: nn.Module, sample: Tensor | None = None) -> Plan:
    """Applies the recipe to a copy of `model` and reads what it did; no random number of the caller's is used up.

    sample: scaled images (N, C, H, W). Raises InputError where the model cannot be copied or fails on the sample.
    """
    from knep.errors import named
    from knep.surgery.edit import copied

    changes: dict[str, list[Change]] = {}
    refused: dict[str, str] = {}
    parameters: list[Parameter] = []
    with torch.random.fork_rng(devices={p.device.index for p in model.parameters() if p.device.type == "cuda"}):
        target = bare(copied(model))
        if sample is not None:
            sample = sample.to(next(target.parameters(), sample).device)
            probe(target, sample)
        for slot, trick in recipe.model_slots.items():
            try:
                with named(slot):
                    changes[slot] = trick(target, sample=sample)
            except InputError as error:
                refused[slot] = str(error)
        try:
            parameters = _read(target, recipe.optimizer(target, sample), changes.get("init", []))
        except InputError as error:
            refused["optimizer"] = str(error)
    return Plan(parameters, {slot: changes[slot] for slot in _SHAPES if slot in changes}, refused)


def _read(model: nn.Module, optimizer: torch.optim.Optimizer, inits: Iterable[Change]) -> list[Parameter]:
    rules = {change.path: change.after for change in inits}
    zeroed = {path.removesuffix("weight") + "bias" for path in rules}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    arms = {id(p): _arm(optimizer, group) for group in optimizer.param_groups for p in group["params"]}
    top = {arm: max(g["lr"] for p, g in groups.items() if arms[p] == arm) for arm in arms.values()}
    rows = []
    for name, p in model.named_parameters():
        group, arm = groups.get(id(p)), arms.get(id(p), "frozen")
        lr = float(group["lr"]) if group else 0.0
        decay = float(group.get("weight_decay", 0.0)) if group else 0.0
        share = lr / float(top[arm]) if group and top[arm] else 0.0
        rows.append(Parameter(name, tuple(p.shape), _init(name, rules, zeroed), decay, lr, share, arm))
    return rows


def _init(name: str, rules: Mapping[str, str], zeroed: Iterable[str]) -> str:
    plain = name.replace("parametrizations.", "").removesuffix(".original1").removesuffix(".original")
    return rules.get(plain) or ("0" if plain in zeroed else "kept")


def _arm(optimizer: torch.optim.Optimizer, group: Mapping[str, object]) -> str:
    """What steps a group: the arm that an optimizer of several names, behind "decay." in the group's name."""
    _, _, arm = str(group.get("name", "")).rpartition("decay.")
    named = "decay." in str(group.get("name", ""))
    return arm if named else type(optimizer).__name__


def _layers(layers: Mapping[str, list[Change]]) -> Table:
    table = Table(title="Layers replaced or inserted", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("slot", "layer", "before", "after"):
        table.add_column(column, overflow="fold")
    for slot, changes in layers.items():
        for c in changes:
            table.add_row(slot, *map(shown, (c.path, c.before, c.after)))
    if not table.row_count:
        table.add_row("none", "", "", "")
    return table


def _parameters(parameters: list[Parameter]) -> Table:
    table = Table(title="Parameters", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("parameter", "shape", "init", "decay", "lr", "x lr", "arm"):
        table.add_column(column, overflow="fold")
    for p in parameters:
        shape = "x".join(map(str, p.shape)) or "()"
        decay = f"{p.decay:.4g}" if p.decay else "no"
        table.add_row(shown(p.name), shape, p.init, decay, f"{p.lr:.4g}", f"{p.multiplier:.4g}", p.arm)
    return table


def _text(tables: Iterable[Table], refused: Mapping[str, str]) -> str:
    """Wide enough for every column, so that it can be searched and compared line by line."""
    page = console(file=io.StringIO(), width=240)
    for table in tables:
        page.print(table)
    for slot, reason in refused.items():
        page.print(f"{slot} cannot be applied: {shown(reason)}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in page.file.getvalue().split("\n")).strip()

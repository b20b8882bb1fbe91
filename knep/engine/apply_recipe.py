"""A recipe as `knep.load` gives it: its slots, and a dry run of what they would do to a model, layer by layer."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from knep.config.schema import RunConfig
from knep.data.base import ImageData
from knep.engine.build import build_module, spec_of
from knep.errors import InputError, named
from knep.optim.thawing import Tuning
from knep.recipes.recipe import Recipe as Slots
from knep.surgery.check_forward import as_inputs, probed
from knep.surgery.edit import Change, bare, copied
from knep.surgery.sample import Inputs
from knep.utils.text import console, shown

_SHAPES = ("norm", "activation", "dropout")


@dataclass(frozen=True)
class Parameter:
    """One parameter of the changed model, and what the recipe has for it.

    init: the rule and what it drew, or "kept"; decay: weight decay, 0 by rule for norms and biases; lr: learning rate
    of its group; multiplier: lr over the largest of its arm; arm: the update rule that steps it, or "frozen"; thaws:
    the epoch in which it begins to be trained, 0-based, None for never, and where it is frozen already.
    """

    name: str
    shape: tuple[int, ...]
    init: str
    decay: float
    lr: float
    multiplier: float
    arm: str
    thaws: int | None = 0


@dataclass(frozen=True)
class Plan:
    """What a recipe would do. str(plan) is a table.

    layers: slot -> layers replaced or inserted; refused: slot -> why it cannot be done, which `apply` would raise.
    said: lines on the weights that the model starts from, and on how they are tuned.
    """

    parameters: list[Parameter]
    layers: Mapping[str, list[Change]]
    refused: Mapping[str, str]
    said: tuple[str, ...] = ()

    def __str__(self) -> str:
        return _text([_layers(self.layers), _parameters(self.parameters, bool(self.said))], self.refused, self.said)

    __repr__ = __str__


class Recipe(Slots):
    """The slots of one recipe, each usable alone; in Lightning by `knep.callbacks` or `knep.LitModule`."""

    def dry_run(
        self,
        model: nn.Module,
        sample: Inputs | None = None,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> Plan:
        """Prints what `apply` and `optimizer` would do, as a table, and returns it; the model stays as it is.

        sample, forward: as for `apply`. Raises InputError where the model cannot be copied, or fails on the sample.
        """
        made = plan(self, model, sample, forward)
        print(made)
        return made


def plan_of_run(run: RunConfig, data: ImageData) -> Plan:
    """What a whole run would begin with, its weights loaded; data: prepared. Raises InputError as training does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        module = build_module(run, spec_of(run, data), data, seed=run.seed)
        report = module.report
        changes = {} if report is None else report.changes
        start = module.about.get("weights")
        rows = _read(module.model, module.make_optimizer(), changes.get("init", []), module.tuning, start)
    return Plan(rows, {slot: changes[slot] for slot in _SHAPES if slot in changes}, {}, tuple(module.said))


def plan(
    recipe: Slots,
    model: nn.Module,
    sample: Inputs | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Plan:
    """Applies the recipe to a copy of `model` and reads what it did; no random number of the caller's is used up.

    sample, forward: as for `Recipe.apply`. Raises InputError where the model cannot be copied or fails on the sample.
    """
    changes: dict[str, list[Change]] = {}
    refused: dict[str, str] = {}
    parameters: list[Parameter] = []
    said: tuple[str, ...] = ()
    with torch.random.fork_rng(devices={p.device.index for p in model.parameters() if p.device.type == "cuda"}):
        target = bare(copied(model))
        sample = as_inputs(target, sample, forward)
        if sample is not None:
            sample = probed(target, sample)
        for slot, trick in recipe.model_slots.items():
            try:
                with named(slot):
                    changes[slot] = trick(target, sample=sample)
            except InputError as error:
                refused[slot] = str(error)
        try:
            tuning = recipe.tuning(target, None, sample)
            said = () if tuning is None else (tuning.said(),)
            optimizer = recipe.optimizer(target, sample, tuning=tuning)
            parameters = _read(target, optimizer, changes.get("init", []), tuning)
        except InputError as error:
            refused["optimizer"] = str(error)
    return Plan(parameters, {slot: changes[slot] for slot in _SHAPES if slot in changes}, refused, said)


def _read(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inits: Iterable[Change],
    tuning: Tuning | None = None,
    start: Mapping[str, Any] | None = None,
) -> list[Parameter]:
    """start: of the weights that were loaded, as `Loaded.plain` says it."""
    rules = {change.path: change.after for change in inits}
    zeroed = {path.removesuffix("weight") + "bias" for path in rules}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    arms = {id(p): _arm(optimizer, group) for group in optimizer.param_groups for p in group["params"]}
    top = {arm: max(g["lr"] for p, g in groups.items() if arms[p] == arm) for arm in arms.values()}
    thaws = {} if tuning is None else tuning.strategy.thaws
    rows = []
    for name, p in model.named_parameters():
        group, arm = groups.get(id(p)), arms.get(id(p), "frozen")
        lr = float(group["lr"]) if group else 0.0
        decay = float(group.get("weight_decay", 0.0)) if group else 0.0
        share = lr / float(top[arm]) if group and top[arm] else 0.0
        how = _init(name, rules, zeroed) if start is None else "new" if name in start["new"] else "loaded"
        when = thaws.get(name, 0) if group else None
        rows.append(Parameter(name, tuple(p.shape), how, decay, lr, share, arm, when))
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


def _parameters(parameters: list[Parameter], tuned: bool) -> Table:
    table = Table(title="Parameters", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("parameter", "shape", "init", "decay", "lr", "x lr", "arm", *(["trained"] if tuned else [])):
        table.add_column(column, overflow="fold")
    for p in parameters:
        shape = "x".join(map(str, p.shape)) or "()"
        decay = f"{p.decay:.4g}" if p.decay else "no"
        row = [shown(p.name), shape, p.init, decay, f"{p.lr:.4g}", f"{p.multiplier:.4g}", p.arm]
        when = "never" if p.thaws is None else f"from epoch {p.thaws + 1}"
        table.add_row(*row, *([when] if tuned else []))
    return table


def _text(tables: Iterable[Table], refused: Mapping[str, str], said: Iterable[str] = ()) -> str:
    """Wide enough for every column, so that it can be searched and compared line by line."""
    out = io.StringIO()
    page = console(file=out, width=240)
    for table in tables:
        page.print(table)
    for line in said:
        page.print(shown(line), soft_wrap=True)
    for slot, reason in refused.items():
        page.print(f"{slot} cannot be applied: {shown(reason)}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n")).strip()

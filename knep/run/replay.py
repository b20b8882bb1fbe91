"""`python train.py replay=<box>`: repeats the step in a black box, and shows it layer by layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from knep.errors import InputError
from knep.guard.black_box import Box, read_box
from knep.guard.finite import first_bad
from knep.guard.optimizer_state import named_state
from knep.guard.policy import KINDS, OF_OPTIMIZER
from knep.guard.step_state import Pass, repeat
from knep.observe.layer_table import show
from knep.utils.text import console, shown

if TYPE_CHECKING:
    from knep.engine.module import Classifier

Context = Callable[[], AbstractContextManager[Any]]


@dataclass
class Replay:
    """What a step came to when it was repeated. same: to the bit, by its loss and gradients; wrong: again as before."""

    box: Box
    found: Pass
    same: bool
    wrong: bool
    weights: str | None = None


def main(path: Path, arguments: Sequence[str]) -> None:
    """Replays the box and prints what came of it. Raises InputError for other overrides than `allow_targets`."""
    others = [a for a in arguments if not a.startswith(("replay=", "allow_targets=", "budget."))]
    if others:
        raise InputError(f"replay= repeats a step as it was: leave out {others[0]}")
    _print(replay(path))


def replay(path: Path) -> Replay:
    """Repeats the step with the box's weights, batch, random state, precision and threads, on the CPU.

    Raises InputError for a box that is none, or whose config may not be built.
    """
    from knep.engine.build import threads
    from knep.engine.load import load_weights, stored_module
    from knep.engine.stored_state import box_wrong

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    box = read_box(path)
    if (box.values["knep"].get("config", {}).get("distill") or {}).get("teacher"):
        raise InputError(f"replay={path} holds a step with a teacher, which the box does not hold: it is not repeated")
    with threads(box.values["threads"]):
        module = stored_module(path, box.values)
        of_optimizer = box.values["kind"] in OF_OPTIMIZER
        wrong = box_wrong(module, box.values, of_optimizer)
        if wrong:
            raise InputError(f"replay={path} is no black box of knep: {wrong}: give another one")
        module.train()
        module.tune(box.values["epoch"])
        context = _precision(box, module)
        load_weights(module, box.values["state_dict"], path)
        try:
            found = repeat(module, box.moment, context)
            weights = _step(box, module, context) if of_optimizer else None
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(f"replay={path}: its batch or its state does not fit its model ({text})") from error
    return Replay(box, found, _same(box, found), _wrong(box, found, weights), weights)


def _precision(box: Box, module: Classifier) -> Context:
    """The autocast of the box's precision; the module is converted where the run's was."""
    from lightning import Fabric

    try:
        plugin = Fabric(accelerator="cpu", devices=1, precision=box.values["precision"]).strategy.precision
    except (ValueError, RuntimeError) as error:
        raise InputError(f"replay={box.path}: its precision is unknown, give another box") from error
    plugin.convert_module(module)

    def context() -> AbstractContextManager[Any]:
        return plugin.forward_context()

    return context


def _step(box: Box, module: Classifier, context: Context) -> str | None:
    """The first weight that is not finite after the optimizer's step, or else what is not in its state."""
    optimizer = module.make_optimizer()
    optimizer.load_state_dict(box.values["optimizer"])
    getattr(optimizer, "train", lambda: None)()
    weights = {name: t.clone() for name, t in box.values["state_dict"].items()}
    module.load_state_dict(weights)
    optimizer.step(lambda: torch.tensor(repeat(module, box.moment, context).loss))  # type: ignore[arg-type]
    module.step.after(optimizer)
    bad = first_bad(module.model.named_parameters()) or first_bad(module.model.named_buffers())
    return bad or first_bad(named_state(module.model, optimizer))


def _same(box: Box, found: Pass) -> bool:
    loss, gradients = box.values["found"].get("loss"), box.values["found"].get("gradients")
    alike = found.loss == loss or (isinstance(loss, float) and math.isnan(loss) and math.isnan(found.loss))
    return alike and gradients in (None, found.gradients)


def _wrong(box: Box, found: Pass, weights: str | None) -> bool:
    kind = box.values["kind"]
    if kind in OF_OPTIMIZER:
        return weights is not None
    if kind in ("loss", "gradient"):
        return not math.isfinite(found.loss) or found.bad is not None
    return True


def _print(result: Replay) -> None:
    box, found = result.box.values, result.found
    page = console(soft_wrap=True)
    page.print(f"step {box['step']} (epoch {box['epoch'] + 1}): {KINDS[box['kind']]}")
    table = show(found.table)
    wide = console(width=max(page.width, page.measure(table, options=page.options.update(width=500)).maximum))
    wide.print(table, crop=False)
    place = found.table.place() or (found.bad and f"the gradient of {found.bad}")
    if box["kind"] in OF_OPTIMIZER:
        place = result.weights and f"{result.weights}, after the optimizer's step"
    page.print(f"first bad: {shown(place or 'nothing, all outputs and gradients are finite')}")
    if result.same:
        page.print(f"loss {found.loss:.9g}: the same step, to the bit")
    else:
        met = box["found"].get("loss")
        page.print(f"loss {found.loss:.9g}, in the run {met!r}: not the same step: another machine, device or build?")

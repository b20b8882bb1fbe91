"""Every classifier of torchvision under the tricks of every slot that touches a model: works, refused, or fails.

Each cell is a fresh copy of the model: the trick, a forward and a backward pass on a small batch, one optimizer step.
It works if loss, gradients and weights are finite, and every parameter that the plain model trains is still trained.
Three more columns ask whether the function is kept to the bit in eval mode: norms by their own kind, activations by
themselves, dropout of p = 0. Models over --meta million parameters have shapes only (the meta device): marked *. For
them glorot_uniform stands in for lsuv, which measures signals.

`python -m tests.exhaustive.zoo` prints a row per model and the reasons of all that was refused; exit code 1 for any
failure.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOTS = {
    "init": ("he_normal", "orthogonal", "lsuv"),
    "norm": ("batch", "layer", "group", "instance", "rms"),
    "activation": ("gelu", "leaky_relu"),
    "dropout": ("standard", "spatial", "stochastic_depth"),
    "optimizer": ("momentum", "adamw", "lion", "muon"),
    "kept": ("norm", "activation", "dropout"),
}
SIZES = (64, 96, 128, 224)  # pixels: the first that the model takes
BATCH, CLASSES, LAYER_DECAY = 4, 10, 0.8
MARKS = {"works": "+", "refused": "-", "fails": "F"}


@dataclass(frozen=True)
class Cell:
    """What became of one option on one model: works, refused or fails, and why."""

    model: str
    slot: str
    option: str
    outcome: str
    reason: str = ""
    meta: bool = False


def option(slot: str, name: str, **values: Any) -> Callable[..., Any]:
    """The trick as its YAML describes it, with other values for some of its keys."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from knep.config.catalog import CONF

    node = OmegaConf.merge(OmegaConf.load(CONF / slot / f"{name}.yaml"), values)
    return instantiate(node, _convert_="all")


def build(name: str, limit: float) -> tuple[nn.Module, Tensor, bool]:
    """The model, a batch of images that it can read, and whether it lies on the meta device.

    limit: million parameters, from which on a model has shapes only.
    """
    from knep.errors import InputError
    from knep.models.torchvision import torchvision

    torch.manual_seed(0)
    for size in SIZES:
        try:
            model = torchvision(3, CLASSES, size, name=name)
        except InputError:
            continue
        meta = sum(p.numel() for p in model.parameters()) > limit * 1e6
        device = "meta" if meta else "cpu"
        return model.to(device), torch.rand(BATCH, 3, size, size, device=device), meta
    raise InputError(f"{name} reads images of none of {SIZES} pixels")


def train_step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> set[str]:
    """One step; returns the parameters that the loss reached. Raises ArithmeticError where a number is not finite."""
    model.train()
    torch.manual_seed(1)
    y = torch.arange(BATCH, device=x.device) % CLASSES
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if x.device.type != "meta" and not all(t.isfinite().all() for t in (loss, *grads)):
        raise ArithmeticError("loss or gradient is not finite")
    optimizer.step()
    if x.device.type != "meta" and not all(p.isfinite().all() for p in model.parameters()):
        raise ArithmeticError("a weight is not finite after the step")
    return reached


def plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def norm_kind(model: nn.Module) -> str | None:
    """The norm option that all of a model's norm layers are of; None where it has none or mixes kinds."""
    kinds = {"batch": nn.modules.batchnorm._BatchNorm, "layer": nn.LayerNorm, "group": nn.GroupNorm}
    found = [kind for kind, cls in kinds.items() if any(isinstance(m, cls) for m in model.modules())]
    return found[0] if len(found) == 1 else None


def activation_kind(model: nn.Module) -> str | None:
    """The activation option that all of a model's activations are of; None where it mixes kinds or has no such option.

    relu where there is no module: they are calls of functions.
    """
    from knep.nn.kinds import ACTIVATIONS

    kinds = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
    found = {type(m) for m in model.modules() if isinstance(m, ACTIVATIONS)} or {nn.ReLU}
    return kinds.get(found.pop()) if len(found) == 1 else None


def fused(name: str) -> bool:
    """Whether an optimizer's YAML asks for a fused kernel."""
    from omegaconf import OmegaConf

    from knep.config.catalog import CONF

    return "fused" in OmegaConf.load(CONF / "optimizer" / f"{name}.yaml")


def apply_norm(model: nn.Module, x: Tensor, name: str) -> None:
    from knep.errors import NoEffectError

    try:
        option("norm", name)(model, sample=x)
    except NoEffectError:
        option("norm", name, insert=True)(model, sample=x)


def try_kept(model: nn.Module, x: Tensor, what: str) -> None:
    before = outputs(model, x)
    if what == "norm":
        option("norm", str(norm_kind(model)))(model, sample=x)
    elif what == "activation":
        option("activation", str(activation_kind(model)))(model, sample=x)
    else:
        option("dropout", "standard", p=0.0)(model, sample=x)
    if x.device.type != "meta" and not torch.equal(before, outputs(model, x)):
        raise ArithmeticError(f"outputs changed by {(before - outputs(model, x)).abs().max():.1e}")


def try_trick(model: nn.Module, x: Tensor, slot: str, name: str) -> set[str]:
    """Applies one option and takes a step; returns the parameters that the loss reached."""
    from knep.optim.param_groups import param_groups

    if slot == "optimizer":
        groups = param_groups(model, lr=0.01, weight_decay=0.01, layer_decay=LAYER_DECAY, sample=x)
        plain = {"fused": False} if x.device.type == "meta" else {}  # no fused kernel works on shapes
        return train_step(model, x, option(slot, name)(groups, lr=0.01, **(plain if fused(name) else {})))
    if slot == "norm":
        apply_norm(model, x, name)
    else:
        option(slot, name)(model, sample=x)
    return train_step(model, x, plain_optimizer(model))


def try_cell(model: nn.Module, x: Tensor, slot: str, name: str, expected: set[str]) -> tuple[str, str]:
    """(outcome, reason) of one option on a copy of the model."""
    from knep.errors import InputError, NoEffectError

    copied = copy.deepcopy(model)
    try:
        if slot == "kept":
            try_kept(copied, x, name)
            return "works", ""
        reached = try_trick(copied, x, slot, name)
    except (InputError, NoEffectError) as error:
        return "refused", " ".join(str(error).split())
    except Exception as error:  # a failure of any kind is what this script looks for
        return "fails", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    lost = sorted(lost_parameters(expected, reached, copied))
    return ("fails", f"no gradient reaches {', '.join(lost[:3])}") if lost else ("works", "")


def lost_parameters(expected: set[str], reached: set[str], model: nn.Module) -> set[str]:
    """Parameters of the plain model that are still there, under their names, and not trained any more."""
    return {name for name in expected - reached if name in dict(model.named_parameters())}


def try_model(name: str, slots: Sequence[str], limit: float) -> list[Cell]:
    """All cells of one model."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, x, meta = build(name, limit)
    plain = copy.deepcopy(model)
    expected = train_step(plain, x, plain_optimizer(plain))
    todo = [(slot, o) for slot in slots for o in SLOTS[slot]]
    # Where a model has no norms, or several kinds, there is no "itself" to replace them by.
    own = {("kept", "norm"): norm_kind(model), ("kept", "activation"): activation_kind(model)}
    todo = [cell for cell in todo if own.get(cell, "any")]
    if meta:
        todo = [("init", "glorot_uniform") if cell == ("init", "lsuv") else cell for cell in todo]
    return [Cell(name, slot, o, *try_cell(model, x, slot, o, expected), meta=meta) for slot, o in todo]


def try_all(names: Sequence[str], slots: Sequence[str], limit: float, processes: int) -> Iterator[list[Cell]]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=4) as pool:
        yield from pool.imap_unordered(partial(try_model, slots=slots, limit=limit), names)


def row(cells: Sequence[Cell]) -> str:
    marks = {slot: "".join(MARKS[c.outcome] for c in cells if c.slot == slot) for slot in SLOTS}
    shown = "  ".join(f"{slot} {m}" for slot, m in marks.items() if m)
    return f"{cells[0].model + ('*' if cells[0].meta else ''):22} {shown}"


def main() -> None:
    from torchvision import models

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", help="comma-separated names; default: all of torchvision's classifiers")
    parser.add_argument("--slots", default=",".join(SLOTS), help=f"comma-separated, of {', '.join(SLOTS)}")
    parser.add_argument("--meta", type=float, default=100, help="million parameters from which on only shapes are run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("outputs/zoo.json"))
    args = parser.parse_args()
    names = args.models.split(",") if args.models else models.list_models(module=models)
    cells: list[Cell] = []
    for of_model in try_all(names, args.slots.split(","), args.meta, args.processes):
        cells += of_model
        print(row(of_model), flush=True)
        for cell in of_model:
            if cell.outcome == "fails":
                print(f"    fails  {cell.slot}={cell.option}: {cell.reason}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([asdict(c) for c in cells], indent=1))
    reasons = Counter(f"{c.slot}={c.option}: {c.reason}" for c in cells if c.outcome == "refused")
    for reason, n in reasons.most_common():
        print(f"refused {n:3}  {reason}")
    counts = Counter(c.outcome for c in cells)
    share = counts["refused"] / len(cells)
    print(
        f"{len(names)} models, {len(cells)} cells: {counts['works']} work, {counts['refused']} refused ({share:.1%}), "
        f"{counts['fails']} fail"
    )
    raise SystemExit(1 if counts["fails"] else 0)


if __name__ == "__main__":
    main()

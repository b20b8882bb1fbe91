"""`knep soup`: one model of the weights of several runs, by their mean or greedily, chosen on validation alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knep.errors import InputError
from knep.utils.text import shortened, shown

if TYPE_CHECKING:
    from torch import Tensor

    from knep.data.base import ImageData
    from knep.engine.module import Classifier

_KINDS = ("greedy", "uniform")
# What of a run's config makes its model, and what its numbers mean; runs of a soup may differ in all else.
_ALIKE = ("model", "norm", "activation", "scaling", "task", "loss", "data")
_FREE = {"data": ("seed", "batch_size", "workers", "cache", "write_cache", "root", "limit")}
_SPEC = ("num_classes", "channels", "image_size", "class_names", "target", "shape")


def add_to(commands: argparse._SubParsersAction) -> None:
    """The arguments of `knep soup`."""
    parser = commands.add_parser("soup", help="the weights of several runs as one model: knep soup RUN RUN")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders or .ckpt files of one model")
    parser.add_argument("--kind", choices=_KINDS, default="greedy", help="greedy keeps what is no worse on validation")
    parser.add_argument("--out", type=Path, default=Path("outputs") / "soup", metavar="FOLDER", help="a new run folder")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE.", help="where their model comes from")
    parser.set_defaults(run=command)


def command(args: argparse.Namespace) -> None:
    """Writes the soup and prints what became of each run. What can be refused at once is, without torch."""
    from knep.config.instantiate import allow

    for name in args.allow:
        allow(name)
    if len(args.runs) < 2:
        raise InputError("a soup is of two runs at least: write knep soup outputs/a outputs/b")
    twice = next((run for i, run in enumerate(args.runs) if run in args.runs[:i]), None)
    if twice is not None:
        raise InputError(f"{shown(twice)} is there twice: a soup is of runs that differ")
    if (args.out / "checkpoints").exists():
        raise InputError(f"{shown(args.out)} is there already: write --out with a new folder")
    found = soup(args.runs, args.out, args.kind)
    for run, loss, kept in zip(found.runs, found.losses, found.kept, strict=True):
        print(f"{shown(run)}  val/loss {loss:.4f}  {'in the soup' if kept else 'left out'}")
    print(f"{found.kind} soup of {sum(found.kept)}: val/loss {found.loss:.4f}, {shown(args.out)}")


@dataclass(frozen=True)
class Made:
    """A soup: its runs, the best on validation first, the loss of each there, which are in it, and its own loss."""

    kind: str
    runs: Sequence[Path]
    losses: Sequence[float]
    kept: Sequence[bool]
    loss: float


def soup(runs: Sequence[Path], out: Path, kind: str = "greedy") -> Made:
    """Mixes the final weights of runs of one model into a run folder that evaluate, predict and export read.

    Wortsman et al. 2022: uniform is the mean of all; greedy begins with the run of the least loss on the validation
    split and keeps each next one, by that loss, where the mean with it is no worse. Runs from one trained start lie in
    one basin; of others, each of which begins at random, greedy keeps the best alone. Batch-norm statistics are
    estimated anew on training images.

    Raises InputError for runs of other models, data or scaling than the first, naming the key.
    """
    from knep.engine.load import load_members, stored_data
    from knep.io import checkpoint
    from knep.optim.soup import greedy, mean_of

    modules = [_one(run, load_members(run)) for run in runs]
    for run, module in zip(runs[1:], modules[1:], strict=True):
        _refuse_another(runs[0], modules[0].about, run, module.about)
    target, data = modules[0], stored_data(modules[0])
    states = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]

    def loss(state: Mapping[str, Tensor]) -> float:
        return _loss_of(target, state, data)

    each = [loss(state) for state in states]
    order = sorted(range(len(runs)), key=lambda i: each[i])
    if kind == "uniform":
        chosen = order
    else:
        places, _ = greedy([states[i] for i in order], loss)
        chosen = [order[i] for i in places]
    mixed = mean_of([states[i] for i in chosen])
    reached = loss(mixed)
    (out / "checkpoints").mkdir(parents=True)
    final = {"state_dict": target.state_dict(), "knep": dict(modules[order[0]].about)}
    checkpoint.write(final, out / "checkpoints" / "final.ckpt")
    kept = [i in chosen for i in order]
    made = Made(kind, [runs[i] for i in order], [each[i] for i in order], kept, reached)
    _write(made, out / "soup.json")
    return made


def _one(run: Path, members: Sequence[Classifier]) -> Classifier:
    if len(members) != 1:
        raise InputError(f"{shown(run)} has {len(members)} members: give the folder of one, {shown(run / 'member_0')}")
    return members[0]


def _refuse_another(first: Path, about: Mapping[str, Any], run: Path, other: Mapping[str, Any]) -> None:
    found = [(key, about.get(key), other.get(key)) for key in _SPEC]
    for group in _ALIKE:
        one, two = (facts["config"].get(group) or {} for facts in (about, other))
        keys = sorted({*one, *two} - {*_FREE.get(group, ())})
        found += [(f"{group}.{key}".removesuffix("._target_"), one.get(key), two.get(key)) for key in keys]
    odd = next(((key, a, b) for key, a, b in found if a != b), None)
    if odd is not None:
        key, a, b = odd
        raise InputError(
            f"{shown(run)} has {key}={shortened(str(b), 60)}, and {shown(first)} {shortened(str(a), 60)}: a soup is of "
            "runs of one model on the same data"
        )


@dataclass(frozen=True)
class _Stage:
    datamodule: ImageData


def _loss_of(module: Classifier, state: Mapping[str, Tensor], data: ImageData) -> float:
    """The loss on the validation split of these weights, which the module then has."""
    from knep.engine.evaluate import measure

    module.load_state_dict(state)
    if any("running_mean" in key for key in state):
        stage: Any = _Stage(data)
        module.estimate_statistics(stage, 0)
    return measure(module, data.val_dataloader()).numbers["loss"]


def _write(made: Made, path: Path) -> None:
    from knep.io.atomic import write_atomic

    runs = [
        {"run": str(run), "val/loss": loss, "kept": kept}
        for run, loss, kept in zip(made.runs, made.losses, made.kept, strict=True)
    ]
    write_atomic(path, json.dumps({"kind": made.kind, "val/loss": made.loss, "runs": runs}, indent=2) + "\n")

"""Injects NaN and Inf into training runs at random steps, and sees what the guard makes of it.

Faults: a pixel of an image, the loss of one batch's labels, the output of a layer, a gradient, the optimizer's first
moment and its second one, whose infinity makes updates of zero and leaves the weights finite.
Each with NaN and Inf, under each action of the guard, in float32 and bfloat16, with an average of the weights and a
checkpoint after every step. Wanted: caught at the very step, no checkpoint with a number that is not finite, and, where
the run stops, a black box under twice the checkpoint's size whose replay is the same step, to the bit, and as bad.

`python -m tests.exhaustive.guard_matrix` prints a row per run; exit code 1 where anything is missed. --every n takes
each n-th.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

from knep.config.compose import compose_config
from knep.config.instantiate import allow, instantiate
from knep.config.schema import RunConfig
from knep.engine.fit import fit_member
from knep.errors import RunFailed
from knep.guard import deferred
from knep.models.cnn import cnn
from knep.run.replay import replay
from knep.run.run import hush
from knep.tasks import classification

FAULTS = ("inputs", "loss", "layer", "gradient", "optimizer", "second")
MOMENTS = {"optimizer": 0, "second": -1}  # of a parameter's state; SAM over SGD has one
VALUES = ("nan", "inf")
ACTIONS = ("stop", "skip", "rollback")
PRECISIONS = ("32-true", "bf16-mixed")
EVERY = 5  # steps from one checkpoint to the next of runs that are judged late
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "window": ["accumulate=3"],
    "lightning": ["lean=false", "clip=norm", "norm=batch"],
    "sam": ["optimizer=sam"],
    # judged a step later, as on a GPU; only where the first bad step ends the run
    "late": [f"checkpoint.every={EVERY}"],
}
EPOCHS, BATCHES, BATCH = 3, 7, 15
BASE = (
    "recipe=none",
    "trainer=cpu",
    f"trainer.max_epochs={EPOCHS}",
    "model=import",
    "model.path=tests.exhaustive.guard_matrix:build",
    "optimizer=adamw",
    "optimizer.lr=0.003",
    "averaging=ema",
    f"data.limit={BATCH * BATCHES}",
    f"data.batch_size={BATCH}",
    "checkpoint.every=1",
    "log_every=1",
    "progress=false",
    "threads=1",
)


@dataclass
class Case:
    """One run. batch: of the run, from 0, at which the fault strikes."""

    fault: str
    value: str
    action: str
    precision: str
    variant: str
    batch: int

    @property
    def number(self) -> float:
        return float(self.value)


class Fault:
    """Strikes when a batch with these labels, in this order, passes; None: never."""

    kind: str = ""
    number: float = 0.0
    image: Tensor | None = None
    labels: Tensor | None = None
    struck = False


def build(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """knep's CNN with the fault in one of its layers."""
    model = cnn(in_channels=in_channels, num_classes=num_classes, image_size=image_size)
    convolution = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1]

    def look(_: nn.Module, inputs: Any) -> None:
        Fault.struck = Fault.image is not None and torch.equal(inputs[0].detach().float(), Fault.image)

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + output.new_full((), Fault.number) if Fault.struck and Fault.kind == "layer" else output

    def spoil_gradient(gradient: Tensor) -> Tensor:
        return gradient + Fault.number if Fault.struck and Fault.kind == "gradient" else gradient

    model.register_forward_pre_hook(look)
    convolution.register_forward_hook(spoil)
    convolution.weight.register_hook(spoil_gradient)
    return model


def spoiled_loss(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Cross-entropy, but for the batch whose labels are bad."""
    loss = F.cross_entropy(logits, y, **options)
    bad = Fault.kind == "loss" and Fault.labels is not None and torch.equal(y, Fault.labels)
    return loss * Fault.number if bad else loss


@contextlib.contextmanager
def fault(case: Case, data: Any) -> Iterator[None]:
    """The fault of a case, in the data of a run and in what the run computes."""
    loader = data.train_dataloader()
    loader.set_epoch(case.batch // BATCHES)
    x, y = list(loader)[case.batch % BATCHES]
    Fault.kind, Fault.number, Fault.image, Fault.labels = case.fault, case.number, x.float(), y
    if case.fault == "inputs":
        images, labels = data._splits["train"]
        images = images.float()
        images[(images == x[3].float()).flatten(1).all(1).nonzero()[0, 0], 0, 2, 2] = case.number
        data._splits["train"] = (images, labels)
    real = classification.F
    classification.F = _Functional()
    try:
        yield
    finally:
        classification.F = real
        Fault.kind, Fault.image, Fault.labels = "", None, None


@contextlib.contextmanager
def judged_late(on: bool) -> Iterator[None]:
    """The guard as on a device that computes while the host goes on, or as it is."""
    real = deferred.LATE_ON
    deferred.LATE_ON = frozenset({"cpu"}) if on else real
    try:
        yield
    finally:
        deferred.LATE_ON = real


class _Functional:
    """torch.nn.functional with the spoiled loss."""

    cross_entropy = staticmethod(spoiled_loss)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


class Poison(Callback):
    """Spoils a moment of a layer before the batch of a case; and notes when the guard acted."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.acted: list[int] = []
        self.clean = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._case.fault in MOMENTS and trainer.current_epoch * BATCHES + batch_idx == self._case.batch:
            optimizer = trainer.optimizers[0]
            states = getattr(optimizer, "base_optimizer", optimizer).state
            state = states[list(pl_module.model.parameters())[2]]
            kept = [t for t in state.values() if torch.is_tensor(t) and t.ndim]
            kept[MOMENTS[self._case.fault]][0] = self._case.number

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.guard.interventions > len(self.acted):
            self.acted.append(trainer.current_epoch * BATCHES + batch_idx)
        self.clean &= all(bool(p.isfinite().all()) for p in pl_module.model.parameters())


def try_case(case: Case, place: Path) -> str:
    """ "caught" and what else was seen, or "missed: " and what went wrong."""
    allow("tests.exhaustive.guard_matrix.")
    hush()
    lines = [*BASE, f"guard={case.action}", f"trainer.precision={case.precision}", *VARIANTS[case.variant]]
    config = compose_config(lines).config
    data = instantiate(config["data"])
    data.prepare()
    poison = Poison(case)
    with fault(case, data), judged_late(case.variant == "late"), contextlib.redirect_stdout(io.StringIO()):
        try:
            fit_member(RunConfig.of(config), data, place, config["seed"], [poison])
        except RunFailed as failed:
            return _stopped(case, place, str(failed))
    if case.action == "none":
        return "missed: nobody looks" if not poison.clean else "did not matter"
    return _went_on(case, place, poison)


def _stopped(case: Case, place: Path, line: str) -> str:
    if case.action != "stop":
        return f"missed: it should have gone on: {line}"
    box = place / "blackbox.pt"
    wrong = bad_checkpoint(place)
    if wrong:
        return f"missed: {wrong}"
    with contextlib.redirect_stdout(io.StringIO()):
        again = replay(box)
    met = again.box.values["epoch"] * BATCHES + again.box.values["batch_idx"]
    if met != last_of_window(case):
        return f"missed: at batch {met}"
    last = place / "checkpoints" / "last.ckpt"  # there is none where the first step was bad
    ratio = box.stat().st_size / last.stat().st_size if last.is_file() else 1.0
    if not (again.same and again.wrong) or ratio >= 2:
        return f"missed: replay the same {again.same}, as bad {again.wrong}, box {ratio:.2f} x the checkpoint"
    return f"caught: {line.partition(';')[0].partition(': ')[2]}; replayed; box {ratio:.2f} x the checkpoint"


def _went_on(case: Case, place: Path, poison: Poison) -> str:
    wrong = bad_checkpoint(place)
    if wrong or not poison.clean:
        return f"missed: {wrong or 'the weights were bad after a step'}"
    # An image is seen once an epoch; every other fault strikes once.
    often = EPOCHS - case.batch // BATCHES if case.fault == "inputs" else 1
    if not poison.acted or poison.acted[0] != _step_of(case) or len(poison.acted) > often:
        return f"missed: acted at batches {poison.acted}"
    rows = list(csv.DictReader((place / "metrics.csv").open()))
    numbers = [float(v) for row in rows for k, v in row.items() if v]
    if not all(map(math.isfinite, numbers)):
        return "missed: metrics.csv has a number that is not finite"
    return f"caught: {case.action}, {len(poison.acted)} of at most {often}"


def last_of_window(case: Case) -> int:
    """The batch at which the fault shows: of micro-batches the very one, but for the optimizer's state."""
    return _step_of(case) if case.fault in MOMENTS else case.batch


def _step_of(case: Case) -> int:
    """The batch whose optimizer step is to be dropped."""
    epoch, batch = divmod(case.batch, BATCHES)
    if case.variant == "late" and case.fault == "second" and case.value == "inf":  # seen before the next checkpoint
        return min(case.batch // EVERY * EVERY + EVERY - 1, epoch * BATCHES + BATCHES - 1)
    if case.variant != "window":
        return case.batch
    return epoch * BATCHES + min(batch // 3 * 3 + 2, BATCHES - 1)


def bad_checkpoint(place: Path) -> str | None:
    """The first number in any checkpoint that is not finite."""
    for path in sorted((place / "checkpoints").glob("*.ckpt")):
        found = next(_bad(torch.load(path, weights_only=True), path.name), None)
        if found:
            return found
    return None


def _bad(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _bad(v, f"{path}/{k}")
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _bad(v, path)
    elif "callbacks" in path and isinstance(value, Tensor) and not value.ndim:
        return  # early stopping and the best checkpoint start from infinity
    elif isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
        yield f"{path} is not finite"


def cases() -> list[Case]:
    """All runs of the matrix; each strikes at a random batch of its own."""
    found = []
    for variant in VARIANTS:
        for fault_ in FAULTS:
            for value in VALUES:
                for action in ACTIONS if variant != "late" else ("stop",):
                    for precision in PRECISIONS:
                        draw = random.Random(f"{variant} {fault_} {value} {action} {precision}")
                        # A bad image is met in each epoch, so it strikes in the first.
                        first, last = (0, BATCHES) if fault_ == "inputs" else (BATCHES, BATCHES * EPOCHS)
                        batch = draw.randrange(first, last)
                        found.append(Case(fault_, value, action, precision, variant, batch))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each n-th run")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts = {"caught": 0, "missed": 0}
    for case in [c for c in cases() if c.variant in args.variants][:: args.every]:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
            outcome = try_case(case, Path(place) / "run")
        counts[outcome.partition(":")[0]] += 1
        shown = f"{case.variant:10}{case.fault:10}{case.value:5}{case.action:9}{case.precision:11}batch {case.batch:3}"
        print(f"{shown}  {outcome}", flush=True)
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    sys.exit(1 if counts["missed"] else 0)


if __name__ == "__main__":
    from tests.exhaustive import guard_matrix  # under the name by which the model is built: one module, one fault

    guard_matrix.main()

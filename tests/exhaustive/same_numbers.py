"""Same seed, same numbers: what must not change a run is changed, and the runs are compared to the bit.

`python -m tests.exhaustive.same_numbers` compares (1) every recipe with itself and with another seed, (2) 0 and 2
processes that decode images, (3) runs that are watched and runs that are not, (4) two processes with one process on the
same global batch: same images in the same order, training losses within 1e-5 relative over 100 steps in float64,
validation and test metrics to the digit. Exit code 1 where one of them differs.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from knep.config.catalog import options
from tests.exhaustive import resume_matrix as matrix
from tests.exhaustive.traces import difference, traces

ROOT = Path(__file__).resolve().parents[2]
RECORD = "KNEP_RECORD"  # a folder: this script then trains what its arguments say, and writes there what it trained on
TOLERANCE = 1e-5  # relative, of a training loss
# Sizes that no batch divides: 143 validation and 359 test images.
PAIR = (
    "recipe=none",
    "data.batch_size=16",
    "trainer.precision=64-true",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=50",
    "optimizer.lr=0.003",
    "progress=false",
    "threads=1",
)
MODELS = {"cnn": [], "mlp": ["model.widths=[32]"], "resnet": ["model.width=0.5", "norm=group"]}
WATCHED = {
    "progress bar": ["progress=true"],
    "checkpoint.every=1": ["checkpoint.every=1"],
    "profiler": ["profile=true"],
    "log of every 100th step": ["log_every=100"],
    "Lightning's loop": ["lean=false"],
}


class Unlogged(Callback):
    """Takes the loggers away."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.loggers = []


def weights(folder: Path) -> dict[str, Any]:
    """The traces of a run without its logs: what it has learned, and what it would go on with."""
    kept = ("/state_dict/", "/optimizer_states/", "/lr_schedulers/", "/current_model_state/", "/averaging_state/")
    return {path: leaf for path, leaf in traces(folder).items() if any(part in path for part in kept)}


def compare(one: Sequence[str], other: Sequence[str], place: Path, callbacks: Sequence[Callback] = ()) -> str:
    """ "identical", or what differs in what the runs of two lists of override lines learned."""
    kept = []
    for name, lines, extra in (("one", one, ()), ("other", other, callbacks)):
        folder = place / name
        if not (folder / "metrics.csv").exists():
            matrix.fit(lines, folder, extra)
        kept.append(weights(folder))
    return difference(*kept)


def recipes() -> Iterator[tuple[str, str]]:
    """(name, outcome) of every recipe, cut short, trained twice with one seed and once with another."""
    for name in options("recipe"):
        lines = [f"recipe={name}", *matrix.BESIDE[f"recipe={name}"]]
        with tempfile.TemporaryDirectory() as place:
            outcome = compare(lines, lines, Path(place))
            yield f"recipe={name} twice", outcome
        with tempfile.TemporaryDirectory() as place:
            outcome = compare(lines, [*lines, "seed=1"], Path(place))
            yield f"recipe={name}, another seed", "fails: identical" if outcome == "identical" else "another run"


def workers() -> Iterator[tuple[str, str]]:
    """(name, outcome) of images that the run decodes itself and of images that two processes decode for it."""
    with tempfile.TemporaryDirectory() as place:
        lines = [*matrix.image_folder(Path(place) / "images"), "augment=flip", "dropout=standard"]
        yield "data.workers 0 and 2", compare([*lines, "data.workers=0"], lines, Path(place))


def watched() -> Iterator[tuple[str, str]]:
    """(name, outcome) of a run with dropout, augmentation and averages, with and without what looks at it."""
    lines = ["dropout=standard", "augment=shift", "averaging=ema", "clip=norm"]
    with tempfile.TemporaryDirectory() as place:
        one, other = Path(place) / "one", Path(place) / "other"
        matrix.fit(lines, one)
        plain = weights(one)  # one run for all of them
        for name, more in WATCHED.items():
            matrix.fit([*lines, *more], Path(place) / name)
            yield f"{name} or not", difference(plain, weights(Path(place) / name))
        matrix.fit(lines, other, [Unlogged()])
        (other / "metrics.csv").write_text("")
        yield "loggers or not", difference(plain, weights(other))


def record() -> None:
    """Trains what the command line says; losses and images of each step go to `RECORD`/<rank>.json."""
    from knep.cli.train import main
    from knep.engine.module import Classifier

    step, losses, images, rank = Classifier.training_step, [], [], [0]

    def recorded(self: Classifier, batch: Any, batch_idx: int) -> Any:
        loss = step(self, batch, batch_idx)
        rank[0] = self.global_rank
        losses.append(float(loss))
        images.append([hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()[:12] for x in batch[0]])
        return loss

    Classifier.training_step = recorded  # type: ignore[method-assign]
    main()
    (Path(os.environ[RECORD]) / f"{rank[0]}.json").write_text(json.dumps({"losses": losses, "images": images}))


def recorded_run(lines: Sequence[str], place: Path) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """(what each rank recorded, summary, metrics.csv's validation columns) of a run in processes of its own."""
    place.mkdir()
    environment = os.environ | {RECORD: str(place), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *lines, f"hydra.run.dir={place}/run"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    ranks = [json.loads(path.read_text()) for path in sorted(place.glob("[0-9].json"))]
    with (place / "run" / "metrics.csv").open(newline="") as f:
        rows = [{k: v for k, v in row.items() if k.startswith("val/")} for row in csv.DictReader(f)]
    return ranks, json.loads((place / "run" / "summary.json").read_text()), json.dumps(rows)


def pair_of_processes(model: str, place: Path) -> str:
    """ "identical" where two processes train as one does, or the first thing that differs."""
    lines = [*PAIR, f"model={model}", *MODELS[model]]
    (alone,), summary, validated = recorded_run([*lines, "trainer=cpu"], place / "one")
    ranks, shared, validated_2 = recorded_run([*lines, "trainer=ddp_sim"], place / "two")
    if alone["images"] != [a + b for a, b in zip(*(rank["images"] for rank in ranks), strict=True)]:
        return "differs: images or their order"
    mean = torch.tensor([rank["losses"] for rank in ranks], dtype=torch.float64).mean(0)
    losses = torch.tensor(alone["losses"], dtype=torch.float64)
    far = ((mean - losses).abs() / losses.abs()).max().item()
    if len(losses) != 100 or far > TOLERANCE:
        return f"differs: {len(losses)} training losses, by {far:.3g} relative"
    same = ("steps", "epochs", "test/acc", "test/loss", "val/acc", "val/loss", "val/acc_best", "best_epoch")
    odd = [key for key in same if summary[key] != shared[key]]
    if validated != validated_2 or odd:
        return f"differs: {odd or 'metrics.csv'}"
    return f"identical in images and metrics, training losses within {far:.1g}"


def main() -> None:
    torch.set_num_threads(1)
    wrong = 0
    for part in (recipes, workers, watched):
        for name, outcome in part():
            wrong += not outcome.startswith(("identical", "another"))
            print(f"{name:40} {outcome}", flush=True)
    for model in MODELS:
        with tempfile.TemporaryDirectory() as place:
            outcome = pair_of_processes(model, Path(place))
        wrong += not outcome.startswith("identical")
        print(f"{f'two processes, model={model}':40} {outcome}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    record() if RECORD in os.environ else main()

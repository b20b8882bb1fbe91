"""How good `knep suggest` is on workloads that it has not seen, and `recipe=auto` on models and data of all kinds.

python -m scripts.suggest [--write]               # each workload of the ledger, predicted from the others
python -m scripts.suggest --auto [PAIR ...] [--budget 60runs] [--out outputs/auto]     # found recipe against AdamW
python -m scripts.suggest --features              # the ledger's workloads looked at again, for features.json

--write puts the table into docs/suggest.md. --auto runs what its folder has not; a row tells of fresh seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from knep.config.compose import compose_config
from knep.config.instantiate import instantiate
from knep.evidence.auto.command import auto
from knep.evidence.effects import metric_of
from knep.evidence.meta.verdicts import spec, stored
from knep.evidence.suggest import features
from knep.evidence.suggest.leave_out import leave_out, table
from knep.evidence.suggest.measured import measured
from scripts.quality import sources

PAGE = Path(__file__).parents[2] / "docs" / "suggest.md"
_MARKS = "<!-- leave_out -->", "<!-- /leave_out -->"
_BASE = {"optimizer": "adamw", "scaling": "standardize"}  # of the ledger, where the slot's control is another
_ROWS = ["data=csv", "model=mlp", "model.widths=[64,64]"]


def _sklearn(name: str) -> Callable[[Path], Path]:
    """Writes a table of scikit-learn's, its classes by name."""

    def write(folder: Path) -> Path:
        from sklearn import datasets

        found: Any = getattr(datasets, f"load_{name}")()
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow([*(word.replace(" ", "_").replace("/", "_") for word in found.feature_names), "target"])
            rows.writerows([*x, found.target_names[y]] for x, y in zip(found.data.tolist(), found.target, strict=True))
        return folder / f"{name}.csv"

    return write


PAIRS: dict[str, tuple[Any, list[str]]] = {
    "digits-mlp": (None, ["data=digits", "model=mlp", "trainer.max_epochs=10"]),
    "digits-cnn": (None, ["data=digits", "model=cnn", "trainer.max_epochs=8"]),
    "wine-mlp": (_sklearn("wine"), [*_ROWS, "data.target=target", "trainer.max_epochs=20"]),
    "cancer-mlp": (_sklearn("breast_cancer"), [*_ROWS, "data.target=target", "trainer.max_epochs=20"]),
    "diabetes-mlp": (
        sources.diabetes,
        [*_ROWS, "task=regression", "data.target=target", "trainer.max_epochs=30"],
    ),
    "digits-resnet": (
        None,
        ["data=digits", "model=resnet", "model.depth=8", "model.width=0.25", "trainer.max_epochs=6"],
    ),
    "iris-mlp": (_sklearn("iris"), [*_ROWS, "data.target=target", "trainer.max_epochs=20"]),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--features", action="store_true")
    parser.add_argument("--auto", nargs="*", metavar="PAIR", choices=[[], *PAIRS])
    parser.add_argument("--budget", default="60runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/auto"))
    asked = parser.parse_args(argv)
    if asked.features:
        _features()
    if asked.auto is not None:
        rows = [pair(name, asked.budget, asked.out / name) for name in asked.auto or PAIRS]
        print("\n".join([_HEAD, *rows]))
        return 0
    made = predicted()
    print(made)
    if asked.write:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(_MARKS[0])
        PAGE.write_text(f"{before}{_MARKS[0]}\n{made}\n{_MARKS[1]}{rest.partition(_MARKS[1])[2]}", encoding="utf-8")
    return 0


def predicted() -> str:
    """The table, of the ledger's tricks against its base recipe."""
    controls = {slot: about["control"] for slot, about in spec()["slots"].items()}
    return table(leave_out(measured(stored(), controls | _BASE), features.stored()))


def _features() -> None:
    about, found = spec(), {}
    for name, lines in about["workloads"].items():
        made = compose_config([*about["base"], *lines])
        data: Any = instantiate(made.config["data"])
        data.prepare()
        found[name] = features.of_run(made.run, data)
    features.STORED.write_text(features.as_text(found), encoding="utf-8")


_HEAD = (
    "| pair | metric | AdamW at its default | found | gain on the test split | gain on validation | verdict "
    "| recipe |\n"
    "|---|---|---|---|---|---|---|---|"
)


def pair(name: str, budget: str, folder: Path) -> str:
    """One row: what stood at the end, on fresh seeds; run where the folder has no answer."""
    source, lines = PAIRS[name]
    if not (folder / "auto.json").is_file():
        with tempfile.TemporaryDirectory() as place:
            where = [] if source is None else [f"data.path={source(Path(place))}"]
            auto([*lines, *where, "threads=1", f"budget={budget}", f"out={folder}"])
    return row(name, json.loads((folder / "auto.json").read_text(encoding="utf-8")), lines)


def row(name: str, said: dict[str, Any], lines: Sequence[str]) -> str:
    """In Markdown."""
    metric = metric_of(compose_config([line for line in lines if not line.startswith("data.target")]).config)
    spans = [
        "{} [{}, {}]".format(*(metric.text(effect[key], signed=True) for key in ("mean", "low", "high")))
        if effect
        else ""
        for effect in (said["test"], said["effect"])
    ]
    means = [metric.text(value) if value is not None else "" for value in said["test_means"]]
    kept = ", ".join(" ".join(one["lines"]) for one in said["kept"])
    stands = kept if said["proved"] else f"the plain line ({kept or 'nothing'} was chosen)"
    return f"| {' | '.join([name, metric.name, *means, *spans, said['verdict'], stands])} |"


if __name__ == "__main__":
    raise SystemExit(main())

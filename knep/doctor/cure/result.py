"""What a cure came to: in words, as a command line, and as a recipe file."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knep.config.catalog import CONF, SLOTS
from knep.config.compose import Composed
from knep.config.stages import option_of, stages_of
from knep.doctor.cure.candidates import Way, key_of
from knep.doctor.findings import Report

_SHOWN = 8  # ways that did not help
FAR = 0.05  # of accuracy behind simple classifiers
# What a cured recipe says by itself.
_IN_RECIPE = frozenset({"recipe", "layer_decay", "accumulate", "trainer.max_epochs", *SLOTS})


@dataclass(frozen=True)
class Cured:
    """The outcome of a cure.

    overrides: the whole cured line; kept: the ways that helped, in order, with the validation accuracy that the line
    had with each; before, after: validation accuracy of the trials, in [0, 1]; loss: mean cross-entropy on validation,
    before and after; tried: every other way with its accuracy, None where it does not fit the model; report: of the
    examination that it began with; trials: how many there were; seconds: of computing; note: why
    it ended before all was tried, "" where it did not.
    """

    overrides: Way
    kept: tuple[tuple[Way, float], ...]
    before: float
    after: float
    report: Report
    loss: tuple[float, float] = (math.nan, math.nan)
    tried: tuple[tuple[Way, float | None], ...] = ()
    trials: int = 0
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        return "\n".join(_told(self))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "before": self.before if self.trials else None,
            "after": self.after if self.trials else None,
            "kept": [{"overrides": list(way), "accuracy": acc} for way, acc in self.kept],
            "tried": [{"overrides": list(way), "accuracy": acc} for way, acc in self.tried],
            "overrides": list(self.overrides),
            "trials": self.trials,
            "seconds": round(self.seconds, 2),
            "note": self.note,
        }


def _told(cured: Cured) -> list[str]:
    lines = []
    if cured.trials:
        lines.append(f"{cured.trials} short trials in {cured.seconds:.0f} s, judged on validation images alone")
        lines.append(f"before: validation accuracy {cured.before:.3f}{_loss(cured.loss[0])}")
        lines += [f"  {acc:.3f} with {' '.join(way)}" for way, acc in cured.kept]
    if cured.kept:
        lines.append(f"after: validation accuracy {cured.after:.3f}{_loss(cured.loss[1])}")
    simple = cured.report.measured.get("trial", {}).get("expected", 0.0)
    if cured.trials and cured.after < simple - FAR:
        lines.append(f"simple classifiers reach {simple:.3f} on these images: something else is wrong too")
    lines += _failed(cured.tried)
    lines += [cured.note] if cured.note else []
    if not cured.kept:
        lines.append("no prescription helped: the run stays as it is" if cured.trials else "nothing was tried")
    lines += [f"for you to mend: {f.about.title}: {f.mend}" for f in cured.report.findings if f.mend]
    return lines


def _failed(tried: Sequence[tuple[Way, float | None]]) -> list[str]:
    """What was tried and not kept, the best first."""
    ranked = sorted(((acc, way) for way, acc in tried if acc is not None), key=lambda row: -row[0])
    reached = [f"{' '.join(way)} ({acc:.3f})" for acc, way in ranked]
    misfits = [" ".join(way) for way, acc in tried if acc is None]
    shown = [*reached[:_SHOWN], "..."] if len(reached) > _SHOWN else reached
    lines = [f"not kept: {', '.join(shown)}"] if shown else []
    return lines + ([f"does not fit this run: {', '.join(misfits)}"] if misfits else [])


def _loss(value: float) -> str:
    return f", loss {value:.3g}" if math.isfinite(value) else ""


def command(overrides: Sequence[str], program: str = "python train.py") -> str:
    """The line to type."""
    return f"{program} {shlex.join(overrides)}"


def by_recipe(path: Path, made: Composed, program: str = "python train.py") -> str:
    """The line to type with the recipe file at `path`, <folder>/recipe/<name>.yaml."""
    folder = shlex.quote(str(path.parent.parent))
    return command([f"recipe={path.stem}", *beside(made)], f"{program} --config-dir {folder}")


def load(path: Path) -> str:
    """The call that reads the recipe file at `path` in Python."""
    return f'recipe = knep.load("{path.stem}", search=["file://{path.parent.parent.resolve()}"])'


def beside(made: Composed) -> Way:
    """The lines that a cured recipe leaves to the command: data and model, also where a recipe chose them, and more."""
    typed = [line for line in made.overrides if not _in_recipe(line)]
    keys = {key_of(line) for line in typed}
    chosen = [line for group in ("data", "model") for line in _chosen(made, group) if key_of(line) not in keys]
    return tuple(sorted([*chosen, *typed], key=lambda line: "." in key_of(line)))


def _in_recipe(line: str) -> bool:
    return key_of(line) in _IN_RECIPE or key_of(line).partition(".")[0] in SLOTS


def _chosen(made: Composed, group: str) -> list[str]:
    """The option of a group, and the values that the run's recipe sets for it."""
    import yaml

    option = made.choices[group]
    values = CONF / "recipe" / made.choices.get("recipe", "none") / f"{group}-{option}.yaml"
    stored = yaml.safe_load(values.read_text(encoding="utf-8")) if values.is_file() else {}
    return [f"{group}={option}", *(f"{group}.{k}={v}".replace(" ", "") for k, v in (stored or {}).items())]


def recipe_yaml(made: Composed, note: str) -> str:
    """A recipe file that says what a composed config says in each slot: for `recipe=<its name>`.

    note: one line for its head.
    """
    import yaml

    head = ["# @package _global_", f"# {note}", "defaults:"]
    head += [f"  - override /{slot}: {made.choices[slot]}" for slot in SLOTS if slot in made.choices]
    values = {slot: _values(made.config[slot]) for slot in SLOTS if slot in made.choices}
    values = {slot: node for slot, node in values.items() if node}
    values |= {key: made.config[key] for key in ("layer_decay", "accumulate")}
    values["trainer"] = {"max_epochs": made.config["trainer"]["max_epochs"]}
    text = yaml.safe_dump(values, sort_keys=False)
    return "\n".join([*head, "  - _self_"]) + "\n" + text


def _values(node: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a slot's node, without what builds it."""
    if option_of(node):  # stages, each with values of its own: their order is in the defaults
        return {stage: _values(node[stage]) for stage in stages_of(option_of(node) or "") if _values(node[stage])}
    return {k: v for k, v in node.items() if not k.startswith("_") and (not isinstance(v, float) or math.isfinite(v))}

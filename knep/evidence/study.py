"""`knep study` and `knep ablate`: arms with the same seeds, run, compared and reported."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from knep.config.schema import RunConfig
from knep.errors import InputError
from knep.evidence import effects, plots, report
from knep.evidence.arguments import Settings, settings, take
from knep.evidence.arms import Arm, ablation
from knep.evidence.trials import Store, plan, run_trials

QUIET = ("progress=false", "threads=1")  # trials run side by side, one thread each, and draw nothing
_NAMED = ("arms", "groups")  # of a study: name -> lines
STUDIES = Path(__file__).parent / "studies"


def ablate(words: Sequence[str]) -> int:
    """`knep ablate recipe=modern data=fashion_mnist seeds=5`: each trick of a recipe, left out and alone.

    Returns 1 where a trial failed, else 0. Raises InputError for words that mean no runs.
    """
    given = settings(words)
    recipe = take(given.overrides, "recipe", "digits_best")
    arms = ablation(recipe, given.overrides, given.slots)
    return run_study(f"Ablation of recipe={recipe}", f"knep ablate {' '.join(words)}", arms, given, f"ablate_{recipe}")


def study(words: Sequence[str]) -> int:
    """`knep study dropout [seeds=5] [key=value ...]`: a study from its YAML, one of knep's or a path of the user's."""
    if not words:
        raise InputError(f"give a study: {', '.join(names())}, or the path of a YAML file")
    spec = read(words[0])
    given = settings(words[1:], seeds=spec["seeds"])
    arms = arms_of(spec, given.overrides)
    return run_study(spec["title"], f"knep study {' '.join(words)}", arms, given, f"study_{Path(words[0]).stem}", spec)


def arms_of(spec: Mapping[str, Any], overrides: Sequence[str]) -> list[Arm]:
    """An arm for each of the study's, in each of its groups where it has some, compared with the control there."""
    made = []
    for group, more in (spec.get("groups") or {"": []}).items():
        ending = f", {group}" if group else ""
        for name, lines in spec["arms"].items():
            control = "" if name == spec["control"] else spec["control"] + ending
            lines = (*spec["common"], *more, *lines, *overrides)
            made.append(Arm(name + ending, lines, control, spec["slot"], name + ending))
    return made


def names() -> list[str]:
    """knep's own studies."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    """A study's YAML: title, slot, common (lines), arms (name -> lines), control, seeds; all in knep/evidence/studies.

    It may have groups (name -> lines), in each of which all arms are run, a question, and `signal: true` for a plot of
    the signal's size per layer at the start.

    Raises InputError where it is missing, or a part of it is missing or of the wrong kind.
    """
    from omegaconf import OmegaConf

    path = STUDIES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise InputError(f"there is no study {name}: write one of {', '.join(names())}, or the path of a YAML file")
    try:
        spec: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML reader has its own errors
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    kinds = {"title": str, "slot": str, "common": list, "arms": dict, "control": str, "seeds": int}
    for key, kind in kinds.items():
        if not isinstance(spec, Mapping) or not isinstance(spec.get(key), kind):
            raise InputError(f"{path}: {key} is missing or no {kind.__name__}, see knep/evidence/studies")
    for key in _NAMED:
        if not all(isinstance(lines, list) for lines in (spec.get(key) or {}).values()):
            raise InputError(f"{path}: each of {key} must be a list of lines such as [dropout=standard, dropout.p=0.2]")
    named = {key: {str(k): [str(line) for line in v] for k, v in (spec.get(key) or {}).items()} for key in _NAMED}
    if spec["control"] not in named["arms"]:
        raise InputError(f"{path}: control {spec['control']} is none of the arms {', '.join(named['arms'])}")
    return {**spec, **named}


def run_study(
    title: str,
    command: str,
    arms: Sequence[Arm],
    given: Settings,
    name: str,
    spec: Mapping[str, Any] | None = None,
) -> int:
    """Runs what is missing of arms x seeds, then prints the table and writes the report."""
    seeds = range(given.seeds)
    trials = plan(arms, seeds, QUIET)
    folder = given.out or Path("outputs") / "studies" / name
    store = Store(folder)
    records = run(trials, store, given.processes)
    keys = {(t.arm, t.seed): t.key for t in trials}
    sides = effects.by_arm(arms, seeds, keys, records)
    refused = effects.refused(sides)
    sides = {name: by_seed for name, by_seed in sides.items() if name not in refused}
    classes = classes_of(records.values(), trials[0].made.config)
    target = given.target or effects.default_target(arms, sides)
    rows = effects.table(arms, sides, classes, target)
    figures = _figures(rows, sides, classes, spec or {}, trials)
    more = {"question": (spec or {}).get("question", ""), "refused": refused}
    found = report.results(title, command, rows, sides, classes, target, more)
    page = report.write(folder, found, rows, figures)
    report.show(rows)
    for arm, reason in refused.items():
        print(f"refused: {arm}: {reason}")
    failed = sorted({r["arm"] for r in records.values() if effects.failed(r)})
    if failed:
        print(f"failed trials in: {', '.join(failed)} (the reasons are in the report)")
    print(f"report: {page}")
    return 1 if failed else 0


def _figures(rows: Any, sides: effects.Records, classes: int, spec: Mapping[str, Any], trials: Any) -> dict[str, Any]:
    """Title -> figure: a study with groups has the learning curves of each apart, and its signals where it asks."""
    groups = {group: [n for n in sides if n.endswith(f", {group}")] for group in spec.get("groups") or ()}
    found = {"Effects": plots.effects(rows)}
    if spec.get("signal"):
        from knep.evidence.signal_size import signal

        first = {t.arm: t.made.config for t in trials if t.seed == 0}
        sizes = {
            group: {name.removesuffix(f", {group}"): signal(RunConfig.of(first[name])) for name in names}
            for group, names in (groups or {"": list(sides)}).items()
        }
        found["Signal per layer at the start"] = plots.signal(sizes)
    for group, names in (groups or {"": list(sides)}).items():
        found[f"Learning curves {group}".strip()] = plots.curves(sides, names)
    return found | {"Accuracy against cost": plots.cost(sides, classes)}


def classes_of(records: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> int:
    """Number of classes, as any trial that ended says, or else as the data says."""
    told = next((int(r["classes"]) for r in records if "classes" in r), None)
    if told is not None:
        return told
    from knep.config.instantiate import instantiate

    data = instantiate(config["data"])
    data.prepare()
    return data.num_classes


def run(trials: Sequence[Any], store: Store, processes: int) -> dict[str, dict[str, Any]]:
    """Runs what is missing with a progress bar, and returns the record of each key."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began = time.monotonic()
    with Progress(*columns, TextColumn("{task.fields[left]}"), refresh_per_second=2) as bar:
        total = len({t.key for t in trials})
        missing = len({t.key for t in trials if store.record(t.key) is None})
        task = bar.add_task("trials", total=total, completed=total - missing, left="")

        def told(done: int, of: int, record: dict[str, Any]) -> None:
            left = (time.monotonic() - began) / done * (of - done)
            said = f"{record['arm']}, seed {record['seed']}: {_said(record)}"
            bar.update(task, advance=1, left=f"about {left / 60:.1f} min left")
            bar.console.print(said, highlight=False, markup=False)

        return run_trials(trials, store, processes, told)


def _said(record: Mapping[str, Any]) -> str:
    if record["status"] in ("failed", "refused", "interrupted"):
        return f"{record['status']} ({record.get('reason', '')})"
    return f"test {record['test/acc']:.2%}" if "test/acc" in record else f"validation {record['val/acc']:.2%}"

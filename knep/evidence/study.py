"""`knep study` and `knep ablate`: arms with the same seeds, run, compared and reported."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knep.config.catalog import SLOTS, cells
from knep.config.compose import Composed
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
    given = settings("ablate", words)
    recipe = take(given.overrides, "recipe", "digits_best")
    arms = ablation(recipe, given.overrides, given.slots)
    return run_study(f"Ablation of recipe={recipe}", f"knep ablate {' '.join(words)}", arms, given, f"ablate_{recipe}")


def study(words: Sequence[str]) -> int:
    """`knep study dropout [seeds=5] [key=value ...]`: a study from its YAML, one of knep's or a path of the user's."""
    if not words:
        raise InputError(f"give a study: {', '.join(names())}, or the path of a YAML file")
    spec = read(words[0])
    given = settings("study", words[1:], seeds=spec["seeds"])
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
    config = trials[0].made.config
    effects.metric_of(config).check_target(given.target)
    folder = given.out or Path("outputs") / "studies" / name
    store = Store(folder)
    records = run(trials, store, given.processes)
    keys = {(t.arm, t.seed): t.key for t in trials}
    sides = effects.by_arm(arms, seeds, keys, records)
    refused = effects.refused(sides)
    if len(refused) == len(sides):
        name, reason = next(iter(refused.items()))
        raise InputError(f"nothing is left to compare, every arm is refused; {name}: {reason}")
    sides = {name: by_seed for name, by_seed in sides.items() if name not in refused}
    metric = compared_by(records.values(), config)
    target = given.target or effects.default_target(arms, sides, metric)
    rows = effects.table(arms, sides, metric, target)
    figures = _figures(rows, sides, metric, spec or {}, trials)
    more = {"question": (spec or {}).get("question", ""), "refused": refused}
    found = report.results(title, command, rows, sides, metric, target, more)
    page = report.write(folder, found, rows, figures, metric)
    report.show(rows, metric)
    for arm, reason in refused.items():
        print(f"refused: {arm}: {reason}")
    failed = sorted({r["arm"] for r in records.values() if effects.failed(r)})
    if failed:
        print(f"failed trials in: {', '.join(failed)} (the reasons are in the report)")
    print(f"report: {page}")
    return 1 if failed else 0


def _figures(
    rows: Any, sides: effects.Records, metric: effects.Metric, spec: Mapping[str, Any], trials: Any
) -> dict[str, Any]:
    """Title -> figure: a study with groups has the learning curves of each apart, and its signals where it asks."""
    groups = {group: [n for n in sides if n.endswith(f", {group}")] for group in spec.get("groups") or ()}
    found = {"Effects": plots.effects(rows, metric)}
    if spec.get("signal"):
        from knep.evidence.signal_size import signal

        first = {t.arm: t.made.config for t in trials if t.seed == 0}
        sizes = {
            group: {name.removesuffix(f", {group}"): signal(RunConfig.of(first[name])) for name in names}
            for group, names in (groups or {"": list(sides)}).items()
        }
        found["Signal per layer at the start"] = plots.signal(sizes)
    for group, names in (groups or {"": list(sides)}).items():
        found[f"Learning curves {group}".strip()] = plots.curves(sides, metric, names)
    return found | {f"{metric.said.capitalize()} against cost": plots.cost(sides, metric)}


def compared_by(records: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> effects.Metric:
    """The metric of trials that ended, with what failures count with. Raises InputError as `effects.with_failures`."""
    records, metric = list(records), effects.metric_of(config)
    if metric.name == "acc":
        return effects.of_classes(classes_of(records, config))
    return effects.with_failures(metric, records)


def classes_of(records: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> int:
    """Number of classes, as any trial that ended says, or else as the data says."""
    told = next((int(r["classes"]) for r in records if "classes" in r), None)
    if told is not None:
        return told
    from knep.config.instantiate import instantiate

    data = instantiate(config["data"])
    data.prepare()
    return data.num_classes


@dataclass
class Whole:
    """How far a command is whose trials come in several rounds. total: trials of all rounds; done: known by now; ran:
    of those, how many ran since `began`, in seconds of a clock."""

    total: int
    done: int = 0
    ran: int = 0
    began: float = field(default_factory=time.monotonic)

    def text(self) -> str:
        """Trials done, and the time left as far as those that ran tell it."""
        said = f"{self.done} of {self.total} trials"
        if not self.ran:
            return said
        left = (time.monotonic() - self.began) / self.ran * (self.total - self.done)
        return f"{said}, about {left / 60:.1f} min left"


def run(trials: Sequence[Any], store: Store, processes: int, whole: Whole | None = None) -> dict[str, dict[str, Any]]:
    """Runs what is missing with a progress bar, or without a terminal a line each minute, and returns the record of
    each key. whole: of a command with more rounds than this one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    metric = effects.metric_of(trials[0].made.config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = len({t.key for t in trials})
    missing = len({t.key for t in trials if store.record(t.key) is None})
    end = total if whole is None else whole.done + len(trials)  # two arms that mean the same run share it
    whole = Whole(total) if whole is None else whole
    whole.done += total - missing
    with Progress(*columns, TextColumn("{task.fields[left]}"), refresh_per_second=2) as bar:
        task = bar.add_task("trials", total=whole.total, completed=whole.done, left="")

        def say(text: str) -> None:
            bar.console.print(text, highlight=False, markup=False)

        def told(done: int, of: int, record: dict[str, Any]) -> None:
            whole.done, whole.ran = whole.done + 1, whole.ran + 1
            bar.update(task, completed=whole.done, left=whole.text().partition(", ")[2])
            say(f"{record['arm']}, seed {record['seed']}: {_said(record, metric)}")

        with nullcontext() if bar.console.is_terminal else each_minute(lambda: say(whole.text())):
            found = run_trials(trials, store, processes, told)
    whole.done = end
    return found


@contextmanager
def each_minute(say: Callable[[], None], seconds: float = 60.0) -> Iterator[None]:
    """Calls `say` every minute for as long as the block runs."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(seconds):
            say()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def foreseen(made: Sequence[Composed], runs: int, processes: int) -> str:
    """How long `runs` runs of each composed config should take, from what the ledger's runs of its data and model took.

    A guess within a factor of two or three: tricks and machines differ.
    """
    seconds = [_seconds(one) for one in made]
    if not all(seconds):
        return "how long that takes the first trial tells: the ledger has none of its kind"
    minutes = sum(filter(None, seconds)) * runs / processes / 60
    said = f"about {minutes:.1f} min" if minutes >= 1 else "less than a minute"
    return f"{said} by what the ledger's runs took, on one idle core each"


def _seconds(made: Composed) -> float | None:
    """Processor seconds of a run, by those of the first control that has its data and model; by epochs."""
    for slot in SLOTS:
        for cell in cells(slot):
            lines = dict(line.split("=", 1) for line in cell.get("lines", ()) if not cell["control"])
            if lines and all(lines[group] == made.choices[group] for group in ("data", "model")):
                epochs = made.config["trainer"]["max_epochs"] / int(lines["trainer.max_epochs"])
                return cell["cpu_seconds"] * epochs
    return None


def _said(record: Mapping[str, Any], metric: effects.Metric) -> str:
    if record["status"] in ("failed", "refused", "interrupted"):
        return f"{record['status']} ({record.get('reason', '')})"
    split = "test" if f"test/{metric.name}" in record else "val"
    value, unit = metric.text(record[f"{split}/{metric.name}"]), "%" if metric.name == "acc" else ""
    name = "" if metric.name == "acc" else f"{metric.name} "
    return f"{'validation' if split == 'val' else split} {name}{value}{unit}"

"""The command `knep doctor`: examines what `train.py` would train with the same override lines."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knep.config.schema import RunConfig, RuntimeConfig
from knep.errors import InputError

if TYPE_CHECKING:
    from knep.config.compose import Composed
    from knep.doctor.cure.result import Cured
    from knep.doctor.findings import Report
    from knep.doctor.subject.setup import Patient


def add_to(commands: Any) -> None:
    """The arguments of `knep doctor`."""
    what = "why a network does not learn, and which overrides mend it: knep doctor model=mlp init=unit_normal"
    parser = commands.add_parser("doctor", help=what)
    parser.add_argument("--model", metavar="PATH", help="what builds your own net: mypkg.nets:build")
    parser.add_argument("--data", metavar="PATH", help="what returns your own (train, val) loaders: mypkg.data:loaders")
    parser.add_argument("--cure", action="store_true", help="try the prescriptions, keep those that help")
    parser.add_argument("--budget", default="90", metavar="SECONDS", help="of computing for --cure, 90 by default")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page with figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as data")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="where --cure writes the cured recipe")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: model=resnet optimizer.lr=1")
    parser.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> None:
    """Prints the report; exits with 0 for a healthy patient, 1 for a sick one, 2 for input that cannot be examined."""
    from knep.doctor.diagnose import diagnose
    from knep.engine.build import threads
    from knep.run.run import hush
    from knep.utils.memory import keep_freed_memory

    hush()
    budget = _seconds(args.budget)
    lines = [*_foreign(args), *args.overrides]
    tell = _teller()
    patient = _patient(lines, args.data)
    how = patient.run.runtime if patient.run is not None else RuntimeConfig()
    if how.keep_memory and patient.device.type == "cpu":
        keep_freed_memory()
    with threads(how.threads):
        report = diagnose(patient, told=tell)
        tell("")
        print(report)
        _written(args, report)
        if args.cure and report.sick:
            _cure(args, lines, report, tell, budget)
    raise SystemExit(int(report.sick))


def _written(args: argparse.Namespace, report: Report, cured: Cured | None = None, how: str = "") -> None:
    """The report as data and as a page; with the cure and how to train it, where there is one."""
    if args.json:
        data = report.as_dict() | ({"cure": cured.as_dict()} if cured else {})
        _write(args.json, json.dumps(data, indent=1) + "\n", "--json")
    if args.html:
        from knep.doctor.report.html import page

        _write(args.html, page(report, f"{cured}\n{how}" if cured else ""), "--html")


def _foreign(args: argparse.Namespace) -> list[str]:
    """The lines of one's own net and loaders: no trick that was not asked for, and batches as the loaders give them."""
    typed = {line.partition("=")[0] for line in args.overrides}
    lines = []
    if (args.model or args.data) and "recipe" not in typed:
        lines.append("recipe=baseline")
    if args.data and "scaling" not in typed:
        lines.append("scaling=none")
    if args.model:
        package = args.model.partition(":")[0].partition(".")[0]
        lines += ["model=import", f"model.path={args.model}", f"allow_targets=[{package}.]"]
    return lines


def _patient(lines: Sequence[str], data: str | None) -> Patient:
    from knep.config.budget import check_config
    from knep.config.compose import compose_config
    from knep.config.instantiate import allow_typed, take_allowed
    from knep.doctor.subject.setup import from_config
    from knep.doctor.subject.user_loaders import Loaders

    allow_typed(lines)
    config = compose_config(lines).config
    take_allowed(config)
    check_config(config)
    return from_config(RunConfig.of(config), lines, Loaders(data, config["model"].get("path")) if data else None)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"--budget {text} is no number of seconds: write one above 0, for example 90")
    return value


def _cure(args: argparse.Namespace, lines: Sequence[str], report: Any, tell: Any, budget: float) -> None:
    from knep.config.compose import compose_config
    from knep.doctor.cure.result import recipe_yaml
    from knep.doctor.cure.search import cure
    from knep.utils.text import shown_lines

    again = partial(_patient, data=args.data)
    cured = cure(lines, make=again, report=report, told=tell, seconds=budget)
    tell("")
    print(shown_lines(f"\ncure\n{cured}"))
    how = ""
    if cured.kept:
        path = args.recipe or Path("outputs/doctor/recipe/cured.yaml")
        made = compose_config(cured.overrides)
        note = f"Cured by knep doctor: validation accuracy {cured.before:.3f} to {cured.after:.3f} in short trials."
        _write(path, recipe_yaml(made, note), "--recipe")
        how = _how_to_train(args, path, made)
        print(shown_lines(how))
    _written(args, report, cured, how)


def _how_to_train(args: argparse.Namespace, path: Path, made: Composed) -> str:
    """What to type for the cured run; loaders of one's own are no data of train.py."""
    from knep.doctor.cure.result import by_recipe, command, load

    found = path.parent.name == "recipe"  # a folder of configs keeps its recipes there
    if args.data:
        how = f":\n  {load(path)}" if found else ""
        return f"the recipe is in {path}, for your own loop and loaders{how}"
    program = "knep train" if args.model else "python train.py"
    how = f"or by the recipe in {path}:\n  {by_recipe(path, made, program)}" if found else f"the recipe is in {path}"
    return f"train it with:\n  {command(made.overrides, program)}\n{how}"


def _write(path: Path, text: str, key: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{key} {path} cannot be written ({error.strerror}): choose another file") from error


def _teller() -> Any:
    """One line that says what is being looked at, where a person is watching."""

    def tell(what: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{what[:100]}")
            sys.stderr.flush()

    return tell

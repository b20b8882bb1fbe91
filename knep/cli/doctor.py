"""The command `knep doctor`: examines what `train.py` would train with the same override lines."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from knep.config.schema import RunConfig, RuntimeConfig
from knep.errors import InputError

if TYPE_CHECKING:
    from knep.config.compose import Composed
    from knep.doctor.cure.result import Cured
    from knep.doctor.findings import Report
    from knep.doctor.subject.setup import Patient


def add_to(commands: argparse._SubParsersAction) -> None:
    """The arguments of `knep doctor`."""
    what = "why a network does not learn, and which overrides mend it: knep doctor model=mlp init=unit_normal"
    parser = commands.add_parser("doctor", help=what)
    parser.add_argument("--model", metavar="PATH", help="what builds your own net: mypkg.nets:build")
    parser.add_argument("--data", metavar="PATH", help="what returns your own (train, val) loaders: mypkg.data:loaders")
    parser.add_argument("--loss", metavar="PATH", help="your own loss, f(output, target): mypkg.losses:loss")
    parser.add_argument("--cure", action="store_true", help="try the prescriptions, keep those that help")
    parser.add_argument("--budget", default="90", metavar="SECONDS", help="of computing for --cure, 90 by default")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page with figures")
    parser.add_argument(
        "--log", type=Path, metavar="PATH", help="a run that has ended: its folder, events, CSV or JSON"
    )
    parser.add_argument("--speed", action="store_true", help="why the run is slow, and which overrides make it faster")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the report as data; without a FILE print nothing else",
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="where --cure writes the cured recipe")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: model=resnet optimizer.lr=1")
    parser.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> None:
    """Prints the report; exits with 0 for a healthy patient, 1 for a sick one, 2 for input that cannot be examined."""
    from knep.cli.doctor_json import as_data, refuse, take

    take(args)
    run = _of_log if args.log is not None else _of_speed if args.speed else _examined
    if args.json == "-":
        as_data(args, run)
    else:
        refuse(args)
        run(args)


def _of_log(args: argparse.Namespace) -> None:
    from knep.doctor.log.checks import examine
    from knep.doctor.log.readers import read

    report = examine(read(args.log))
    print(report)
    _written(args, report)
    raise SystemExit(2 if report.unknown else int(report.sick))


def _of_speed(args: argparse.Namespace) -> None:
    from knep.doctor.speed.prescribe import speed
    from knep.run.run import hush

    hush()
    tell = _teller()
    report = speed([*_foreign(args), *args.overrides], told=tell)
    tell("")
    print(report)
    _written(args, report)
    raise SystemExit(int(report.sick))


def _examined(args: argparse.Namespace) -> None:
    from knep.doctor.diagnose import diagnose
    from knep.engine.build import threads
    from knep.run.run import hush
    from knep.utils.memory import keep_freed_memory

    hush()
    budget = _seconds(args.budget)
    lines = [*_foreign(args), *args.overrides]
    tell = _teller()
    if _of_any_task(args, lines):
        _any(args, lines, tell)
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


def _of_any_task(args: argparse.Namespace, lines: Sequence[str]) -> bool:
    """Whether it is another examination than that of one class of several for images, with cross-entropy."""
    from knep.doctor.subject.of_run import plain_classes
    from knep.doctor.subject.user_loaders import gives_images

    if args.loss and not args.data:
        raise InputError("--loss is for loaders of your own: write --data PATH too, or loss=NAME for knep's data")
    if args.loss or not plain_classes(_run(lines)):
        return True
    return bool(args.data and args.model) and not gives_images(args.data)


def _any(args: argparse.Namespace, lines: Sequence[str], tell: Callable[[str], None]) -> NoReturn:
    """The same for any task, batches and loss; it prints the report and exits."""
    from knep.doctor.examine_any import examine_any
    from knep.doctor.subject.of_run import of_loaders, of_run
    from knep.engine.build import threads

    if args.cure:
        raise InputError("--cure tries lines on one class of several for images: leave it out, and mend by the report")
    run = _run(lines)
    with threads(run.runtime.threads):
        if args.data:
            subject, notes = of_loaders(run, args.model, args.data, args.loss, lines), ()
        else:
            subject, notes = of_run(run)
        report = examine_any(subject, told=tell)
        report = replace(report, notes=(*report.notes, *notes))
    tell("")
    print(report)
    _written(args, report)
    raise SystemExit(int(report.sick))


def _run(lines: Sequence[str]) -> RunConfig:
    from knep.config.budget import check_config
    from knep.config.compose import compose_config
    from knep.config.instantiate import allow_typed, take_allowed

    allow_typed(lines)
    config = compose_config(lines).config
    take_allowed(config)
    check_config(config)
    return RunConfig.of(config)


def _written(args: argparse.Namespace, report: Report, cured: Cured | None = None, how: str = "") -> None:
    """The report as data and as a page; with the cure and how to train it, where there is one."""
    if args.json:
        from knep.cli.doctor_json import data_of, dumped

        args.said = data_of(args, report) | ({"cure": cured.as_dict()} if cured else {})
        if args.json != "-":
            _write(Path(args.json), dumped(args.said), "--json")
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
    from knep.doctor.subject.setup import from_config
    from knep.doctor.subject.user_loaders import Loaders

    run = _run(lines)
    return from_config(run, lines, Loaders(data, run.plain["model"].get("path")) if data else None)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"--budget {text} is no number of seconds: write one above 0, for example 90")
    return value


def _cure(
    args: argparse.Namespace, lines: Sequence[str], report: Report, tell: Callable[[str], None], budget: float
) -> None:
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


def _teller() -> Callable[[str], None]:
    """One line that says what is being looked at, where a person is watching."""

    def tell(what: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{what[:100]}")
            sys.stderr.flush()

    return tell

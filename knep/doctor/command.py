"""The command `knep doctor`: examines what `train.py` would train with the same override lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knep.errors import InputError

if TYPE_CHECKING:
    from knep.doctor.findings import Report
    from knep.doctor.patient import Patient


def add_to(commands: Any) -> None:
    """The arguments of `knep doctor`."""
    what = "why a network does not learn, and which overrides mend it: knep doctor model=mlp init=unit_normal"
    parser = commands.add_parser("doctor", help=what)
    parser.add_argument("--model", metavar="PATH", help="what builds your own net: mypkg.nets:build")
    parser.add_argument("--data", metavar="PATH", help="what returns your own (train, val) loaders: mypkg.data:loaders")
    parser.add_argument("--cure", action="store_true", help="try the prescriptions, keep those that help")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page with figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as data")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="where --cure writes the cured recipe")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: model=resnet optimizer.lr=1")
    parser.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> None:
    """Prints the report; exits with 0 for a healthy patient, 1 for a sick one, 2 for input that cannot be examined."""
    from knep.doctor.diagnose import diagnose
    from knep.fit import threads
    from knep.train import hush

    hush()
    lines = [*_foreign(args), *args.overrides]
    tell = _teller()
    patient = _patient(lines, args.data)
    with threads(patient.config["threads"]):
        report = diagnose(patient, told=tell)
        tell("")
        print(report)
        _written(args, report)
        if args.cure and report.sick:
            _cure(args, lines, report, tell)
    raise SystemExit(int(report.sick))


def _written(args: argparse.Namespace, report: Report) -> None:
    if args.json:
        _write(args.json, json.dumps(report.as_dict(), indent=1) + "\n", "--json")
    if args.html:
        from knep.doctor.html import page

        _write(args.html, page(report), "--html")


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
    from knep.compose import compose_config
    from knep.doctor.loaders import Loaders
    from knep.doctor.patient import from_config
    from knep.safe import allow_typed, take_allowed

    allow_typed(lines)
    config = compose_config(lines).config
    take_allowed(config)
    return from_config(config, lines, Loaders(data) if data else None)


def _cure(args: argparse.Namespace, lines: Sequence[str], report: Any, tell: Any) -> None:
    from knep.compose import compose_config
    from knep.doctor.cure import cure, recipe_yaml

    cured = cure(lines, make=lambda changed: _patient(changed, args.data), report=report, told=tell)
    tell("")
    print(f"\ncure\n{cured}")
    if cured.kept:
        path = args.recipe or Path("conf/recipe/cured.yaml")
        note = f"Cured by knep doctor: validation accuracy {cured.before:.3f} to {cured.after:.3f} in short trials."
        _write(path, recipe_yaml(compose_config(cured.overrides), note), "--recipe")
        print(
            f"the same as a recipe is in {path}: python train.py --config-dir {path.parent.parent} recipe={path.stem}"
        )


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

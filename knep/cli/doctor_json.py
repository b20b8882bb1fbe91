"""`knep doctor --json`: the report for programs, by a schema with a version; stdout holds nothing else."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from knep.errors import InputError, RunFailed

if TYPE_CHECKING:
    from knep.doctor.findings import Report

SCHEMA = "knep.doctor/1"  # the number grows when a program that reads it would have to change


def take(args: argparse.Namespace) -> None:
    """An override behind `--json` is no file."""
    args.said = None
    if args.json is not None and args.json != "-" and "=" in args.json:
        args.overrides, args.json = [args.json, *args.overrides], "-"


def refuse(args: argparse.Namespace) -> None:
    """Raises InputError for options that exclude each other."""
    if args.log is not None:
        named = {"--model": args.model, "--data": args.data, "--cure": args.cure, "--speed": args.speed}
        given = next((option for option, value in named.items() if value), None)
        if given is None and args.overrides:
            given = args.overrides[0]
        if given is not None:
            raise InputError(f"--log reads a run that has ended, and {given} describes one to examine: leave one out")
    if args.speed and (args.cure or args.data):
        raise InputError(f"--speed times knep's own run: leave {'--cure' if args.cure else '--data'} out")


def data_of(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    """The report under its schema."""
    kind = "log" if args.log is not None else "speed" if args.speed else "run"
    return {"schema": SCHEMA, "examined": kind, **report.as_dict()}


def as_data(args: argparse.Namespace, run: Callable[[argparse.Namespace], None]) -> None:
    """Runs the examination with all that it prints on stderr, then prints its data alone; errors are data too."""
    code, out = 0, sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            refuse(args)
            run(args)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except (InputError, RunFailed) as error:
            code = 2 if isinstance(error, InputError) else 1
            args.said = {"schema": SCHEMA, "error": " ".join(str(error).split())[:1000]}
    out.write(dumped(args.said))
    out.flush()
    raise SystemExit(code)


def dumped(data: dict[str, Any]) -> str:
    """JSON as its standard has it: what is not finite is null."""
    return json.dumps(strict(data), indent=1, allow_nan=False) + "\n"


def strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""`knep mcp`: doctor, plan, ls and show as tools of a Model Context Protocol server, over stdin and stdout.

Each call is one command of `knep` in a process of its own: what that refuses is refused, and nothing runs beyond it.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence

from knep.errors import InputError
from knep.utils.text import shown_lines

_LONGEST = 200_000  # characters of an answer
_SECONDS = 600  # that a command may take
_CODE = ("allow_targets", "model.path", "data.path", "loss.path", "model=import")  # lines that name code to import
_INSTALL = "knep mcp needs the package mcp: pip install 'knep[mcp]'"


def add_to(commands: argparse._SubParsersAction) -> None:
    """The arguments of `knep mcp`."""
    parser = commands.add_parser("mcp", help="a server for programs that speak MCP: doctor, plan, ls and show")
    parser.add_argument("--own-code", action="store_true", help="let callers name models and loaders to import and run")
    parser.set_defaults(run=serve)


def serve(args: argparse.Namespace) -> None:
    """Answers until stdin ends. Raises InputError where the package mcp is missing."""
    try:
        from mcp.server.mcpserver import MCPServer  # pyright: ignore[reportMissingImports]
        from mcp.server.mcpserver.exceptions import ToolError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(_INSTALL) from error
    server = MCPServer("knep", instructions="Why a network does not learn, what a recipe does, which tricks there are.")
    for tool in tools(args.own_code):
        server.tool()(_told(tool, ToolError))
    server.run("stdio")


def _told(tool: Callable[..., str], error: type[Exception]) -> Callable[..., str]:
    """The tool, whose refusals are answers of the protocol."""

    @functools.wraps(tool)
    def called(*args: object, **how: object) -> str:
        try:
            return tool(*args, **how)
        except InputError as refusal:
            raise error(str(refusal)) from None

    return called


def tools(own_code: bool) -> list[Callable[..., str]]:
    """The tools, as functions; own_code: whether a caller may name code of its own."""

    def doctor(overrides: list[str], model: str = "", data: str = "") -> str:
        """Why a run does not learn, as JSON by the schema knep.doctor/1. overrides: lines of train.py, such as
        model=mlp optimizer.lr=1; model, data: own code as mypkg.nets:build, where the server allows it."""
        given = [*([f"--model={model}"] if model else []), *([f"--data={data}"] if data else [])]
        return asked(["doctor", "--json", *given, *checked(overrides, own_code, model, data)])

    def doctor_log(path: str) -> str:
        """What the curves of a run that has ended tell, as JSON: a run folder, TensorBoard events, a CSV or a
        trainer_state.json."""
        return asked(["doctor", "--json", f"--log={path}"])

    def plan(overrides: list[str]) -> str:
        """What a run would do to its model, layer by layer; nothing is trained."""
        return asked(["plan", *checked(overrides, own_code)])

    def ls(group: str = "") -> str:
        """The groups of options, or the options of one group with the reason for each."""
        return asked(["ls", *([named(group)] if group else [])])

    def show(option: str) -> str:
        """The file of an option, as optimizer/muon, or of a recipe with its values."""
        return asked(["show", named(option)])

    return [doctor, doctor_log, plan, ls, show]


def checked(overrides: Sequence[str], own_code: bool, *paths: str) -> list[str]:
    """The lines. Raises InputError for options among them, and for code to import where that is not allowed."""
    odd = next((line for line in overrides if line.startswith("-") or "=" not in line), None)
    if odd is not None:
        raise InputError(f"{odd} is no override: write key=value")
    code = [line for line in overrides if line.lstrip("+~").startswith(_CODE) or "_target_" in line]
    if (code or any(paths)) and not own_code:
        what = [*code, *filter(None, paths)][0]
        raise InputError(f"{what} names code to import: the server must be started as knep mcp --own-code")
    return list(overrides)


def named(word: str) -> str:
    """A name. Raises InputError for an option."""
    if word.startswith("-"):
        raise InputError(f"{word} is no name: write one that ls lists")
    return word


def asked(words: Sequence[str]) -> str:
    """What a command answers: its output, or its one line of error."""
    command = [sys.executable, "-m", "knep.cli", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return json.dumps({"error": f"no answer within {_SECONDS} seconds: give a smaller run"})
    text = done.stdout if done.stdout.strip() else done.stderr.strip().rpartition("\n")[2]
    return shown_lines(text)[:_LONGEST]

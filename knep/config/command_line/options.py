"""Options of the command line that are none: words with dashes, as other tools have them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from knep.config.catalog import GROUPS, options
from knep.config.command_line.readers import top_level
from knep.config.command_line.vocabulary import line_for, meant, option_line
from knep.errors import InputError

_COMPOSED = "knep composes its own config: put your choices into a file recipe/mine.yaml of a folder, and write "


def refuse_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Raises InputError for an option that a parser does not know, with the override that means the same.

    And for those of Hydra that would run another config than the one that is checked.
    """

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}: write --help for the options that there are")

    parser.error = refuse  # type: ignore[method-assign]
    words = [a.partition("=")[0] for a in arguments if a.startswith("--")]
    begun = {word: [o for o in parser._option_string_actions if o.startswith(word)] for word in words}
    several = next((word for word, found in begun.items() if len(found) > 1 and word not in found), None)
    if several is not None:  # which argparse would answer with its usage
        whole = next(a for a in arguments if a.partition("=")[0] == several)
        raise InputError(f"{several} is no option: {instead(whole, arguments)}")
    known, rest = parser.parse_known_args(list(arguments))
    unknown = next((word for word in rest if word.startswith("-")), None)
    if unknown is not None:
        raise InputError(f"{unknown.partition('=')[0]} is no option: {_meant_of(parser, unknown, arguments)}")
    for name in ("config_name", "config_path"):
        if getattr(known, name, None) not in (None, "train"):
            raise InputError(
                f"--{name.replace('_', '-')}={getattr(known, name)}: {_COMPOSED}--config-dir=FOLDER recipe=mine"
            )
    for name in ("resolve", "package"):
        if getattr(known, name, None) and not known.cfg:
            raise InputError(f"--{name} shows nothing by itself: write --cfg=job --{name}")
    first = (getattr(known, "package", None) or "_global_").partition(".")[0]
    if first != "_global_" and first not in (*top_level(), "hydra"):
        raise InputError(f"--package={known.package}: there is no key {first}: write --package=optimizer, for example")
    if getattr(known, "hydra_help", False):
        raise InputError("--hydra-help is Hydra's own: write --help")
    if getattr(known, "experimental_rerun", None):
        raise InputError("--experimental-rerun is not known here: write ckpt=RUN, which goes on with a run")


def _meant_of(parser: argparse.ArgumentParser, option: str, arguments: Sequence[str]) -> str:
    """The nearest option of the command that was typed, or the override that the option means."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and arguments[0] in action.choices:
            parser = action.choices[arguments[0]]
    near = difflib.get_close_matches(option.partition("=")[0], parser._option_string_actions, n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]}?"
    if parser.prog.startswith("knep ") and not any(a.dest in ("overrides", "words") for a in parser._actions):
        return f"write {parser.prog} --help for the options that there are"
    return instead(option, arguments)


def instead(option: str, arguments: Sequence[str]) -> str:
    """The override line that an option with dashes means."""
    name, equals, value = option.lstrip("-").partition("=")
    key = name.replace("-", "_")
    if not equals:
        at = next((i for i, a in enumerate(arguments) if a == option), len(arguments))
        after = [*arguments, "", ""][at + 1]
        alone = after == "" or after.startswith("-") or "=" in after
        value = ("RUN" if (line_for(key, "") or "").startswith("write ckpt=") else "true") if alone else after
    if key in GROUPS:
        option_meant = value if value in options(key) else meant(key, value)
        return f"write {key}={option_meant}" if option_meant else option_line(key, value) or f"write {key}=..."
    return line_for(key, value) or f"write {key}={value}, without dashes"

"""Override lines as people type them, made into lines that Hydra reads: paths quoted, other words for options taken."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from knep.config.catalog import GROUPS, options
from knep.config.command_line.vocabulary import meant, otherwise
from knep.config.stages import SLOT, as_option
from knep.errors import InputError
from knep.utils.text import shortened

PATHS = ("ckpt", "replay", "data.root", "data.cache", "data.path", "data.test_path", "model.weights")
PATHS += ("hydra.run.dir", "hydra.sweep.dir")
_UNTEXT = re.compile(r"[\ud800-\udfff]")  # what Python makes of bytes that are none
_LINES, _CHARACTERS, _KEY = 1000, 8000, 200  # of a command
_LINE = re.compile(r"(?P<mark>\+{0,2})(?P<key>[\w.@/]+)=(?P<value>.*)", re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")  # what Hydra reads as text, and as nothing else
_ESCAPE = re.compile(r"\\[\\()\[\]{}:=, \t]")
_LONGEST, _LONGEST_PART = 3500, 255  # bytes of a path with room for the files in it, and of one name
_COLUMNS = ("data.target", "data.images")  # names from the head of somebody's table
_ODD = re.compile(r"[^\w .+-]|[^\x00-\x7f]")  # in a name that Hydra would not read as it stands
_WORDS = ("null", "true", "false", "inf", "nan")  # however they are written
_STAGES = re.compile(r"(?P<quote>['\"]?)\[(?P<names>[\w, ]*)\](?P=quote)")  # a list, in quotes or not
_CALL = re.compile(r"[a-z]+\(.*\)", re.DOTALL)


def readable(arguments: Sequence[str], multirun: bool = False) -> list[str]:
    """The arguments with paths quoted, `~` for the user's home, and options by knep's names; one line says which.

    multirun: commas stand between values. Raises InputError for a path that is empty.
    """
    check_length(arguments)
    return [_readable(argument, multirun) for argument in arguments]


def check_length(lines: Sequence[str], place: str = "the command line") -> None:
    """Raises InputError for more than is composed in seconds: the time of a parse grows with the square of a line."""
    if len(lines) > _LINES:
        raise InputError(f"{place} has {len(lines):,} overrides, at most {_LINES:,} are read: write a config file")
    for line in lines:
        if not line.isascii() and _UNTEXT.search(line):
            raise InputError(f"{place}: {line!r} is no text in UTF-8: rename the file or folder")
        if len(line) > _CHARACTERS:
            what = f"{shortened(line, 40)!r} has {len(line):,} characters, at most {_CHARACTERS:,} are read"
            raise InputError(f"{place}: {what}: write a config file")
        key = line.partition("=")[0]
        if len(key) > _KEY:
            raise InputError(f"{place}: {shortened(key, 40)!r} has {len(key):,} characters, which is no key: remove it")


def _readable(argument: str, multirun: bool) -> str:
    found = _LINE.fullmatch(argument)
    if found is None:
        return argument
    mark, key, value = found["mark"], found["key"], found["value"]
    if key in PATHS:
        return f"{mark}{key}={_path(key, value, multirun)}"
    if key in _COLUMNS and not value.startswith(("[", "$")) and not _in_quotes(value) and _ODD.search(value):
        several = value.split(",") if multirun else [value]
        return f"{mark}{key}={','.join(quoted(name) if _ODD.search(name) else name for name in several)}"
    if key in GROUPS and re.match(r"[\w.,-]+$", value):
        return f"{mark}{key}={','.join(_option(key, word) for word in value.split(','))}"
    if key == SLOT and "[" in value:
        return f"{mark}{key}={_STAGES.sub(_stages, value)}"
    return argument


def _stages(found: re.Match[str]) -> str:
    """A list of stages as one option's name: without spaces, and in quotes, for Hydra to take it as text."""
    names = found["names"].replace(" ", "")
    return quoted(as_option(_option(SLOT, name) for name in names.split(","))) if names else "'[]'"


def _option(group: str, word: str) -> str:
    if not word or word in options(group):
        return word
    option = meant(group, word)
    if option is None:
        return word
    other = otherwise(word)
    _say(f"{group}={word} is taken as {group}={option}" + (f", not as {group}={other}" if other else ""))
    return option


_heard: dict[str, bool] = {}  # what is to be said -> whether it was


def _say(line: str) -> None:
    """Once, although a command may compose the same line many times; and not where the line is refused."""
    _heard.setdefault(line, False)


def tell() -> None:
    """Prints what other words were taken as, to stderr."""
    for line, told in _heard.items():
        if not told:
            _heard[line] = True
            print(f"knep: {line}", file=sys.stderr)


def untold() -> None:
    """Forgets what was to be said of lines that are refused."""
    for line in [line for line, told in _heard.items() if not told]:
        del _heard[line]


def _path(key: str, value: str, multirun: bool) -> str:
    if not value.strip():
        raise InputError(f"{key}= is empty: write a path, or leave it out")
    escaped = "\\" in value and _PLAIN.fullmatch(_ESCAPE.sub("x", value))
    if value in ("null", "true", "false") or "${" in value or _CALL.fullmatch(value) or escaped:
        return value  # for Hydra to read
    if multirun and "," in value and not _in_quotes(value):
        return ",".join(_path(key, part, False) for part in value.split(","))
    text = unquoted(value)
    if text.startswith("~"):
        try:
            text = str(Path(text).expanduser())
        except RuntimeError:
            raise InputError(
                f"{key}={value}: nobody here is called {text.split('/')[0]}: write the whole path"
            ) from None
    if len(os.fsencode(text)) > _LONGEST or any(len(os.fsencode(part)) > _LONGEST_PART for part in text.split("/")):
        raise InputError(f"{key}={shortened(text, 60)} is longer than a path can be: choose a shorter one")
    return text if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else quoted(text)


def _in_quotes(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def quoted(text: str) -> str:
    """`text` as one value of an override line, whatever is in it."""
    inside = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", inside) + "'"


def unquoted(value: str) -> str:
    """The text that a quoted value of an override line stands for; any other value as it is."""
    if not _in_quotes(value):
        return value
    quote, inside = value[0], value[1:-1]
    inside = re.sub(r"(\\+)$", lambda found: found[1][: len(found[1]) // 2], inside)
    return re.sub(rf"(\\+){quote}", lambda found: found[1][: len(found[1]) // 2] + quote, inside)


def path_typed(arguments: Sequence[str], key: str) -> str | None:
    """The path that the last line of a key names; None where there is none, or it says null."""
    values = [a.lstrip("+").partition("=")[2] for a in arguments if a.lstrip("+").startswith(f"{key}=")]
    return unquoted(values[-1]) if values and values[-1] not in ("", "null") else None


def to_type(key: str, value: str) -> str:
    """The line that means this text and nothing else, as it is typed in a shell."""
    line = f"{key}={quoted(value)}"
    return shlex.quote(line) if re.search(r'["$`\\!]', line) else f'"{line}"'

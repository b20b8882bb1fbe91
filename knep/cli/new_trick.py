"""`knep new SLOT/NAME`: the four files of a new trick, in a clone, with a test that fails until its formula is there.

All is looked at first and written last: a trick that is refused leaves every file as it was.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import json
import keyword
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from knep.cli.new_stubs import Stub, stubs
from knep.config.catalog import SLOTS
from knep.config.command_line.vocabulary import meant
from knep.errors import InputError, is_full
from knep.io.atomic import write_atomic
from knep.utils.text import shown

_LONGEST = 30  # characters of a name: longer ones would not fit the lines that hold them
_WIDTH = 120


def new(trick: str) -> None:
    """Writes function, YAML, row and card entry of a trick such as "clip/mine", and prints what is left to do."""
    slot, name = _split(trick)
    root = _clone()
    texts = _texts(root, slot, name)
    _write(texts)
    print(_next_steps(slot, name, [path.relative_to(root).as_posix() for path in texts]))


def _split(trick: str) -> tuple[str, str]:
    """Slot and name; InputError for a slot that is none, or a name that no trick can have."""
    slot, _, name = trick.partition("/")
    known = list(stubs())
    if slot not in known:
        close = difflib.get_close_matches(slot, known, n=1)
        raise InputError(f"there is no slot {slot}: " + (f"did you mean {close[0]}?" if close else ", ".join(known)))
    if not name:
        raise InputError(f"{slot} needs a name for the trick: write knep new {slot}/mine")
    why = _unfit(name)
    if why:
        raise InputError(f"{name} is no name for a trick: {why}")
    there = meant(slot, name)
    if there:
        said = "is there already" if there == name else f"means {slot}={there} already"
        raise InputError(f"{name} {said}: take another name, or edit knep/recipes/{slot}")
    return slot, name


def _unfit(name: str) -> str:
    """Why this can be no name of a function, a file and an override; "" where it can."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        return "write small letters, digits and single underscores, a letter first"
    if len(name) > _LONGEST:
        return f"it has {len(name)} characters, of {_LONGEST} at most"
    if keyword.iskeyword(name) or hasattr(builtins, name):
        return "Python has it"
    if name in ("none", "default", "null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf"):
        return "on a command line or in YAML it is something else"
    return ""


def _clone() -> Path:
    """The top of the clone that the current folder lies in."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        project = folder / "pyproject.toml"
        if project.is_file() and re.search(r'^name = "knep"$', _read(project), re.MULTILINE):
            return folder
    raise InputError(f"{shown(here)} is in no clone of knep: a trick is added to its source, so clone it and go there")


def _texts(root: Path, slot: str, name: str) -> dict[Path, str]:
    """Each file that is new or changes -> its text."""
    stub = stubs()[slot]
    words = {"name": name, "made": _public(stub, name)}
    option = root / "knep" / "conf" / slot / f"{name}.yaml"
    if option.exists():
        raise InputError(f"{slot}={name} is there already: {option.relative_to(root)}")
    source, test = root / "knep" / "recipes" / f"{slot}.py", root / "tests" / "recipes" / f"test_{slot}.py"
    folder = source.with_suffix("")
    if folder.is_dir():
        source = folder / "__init__.py"
    about = root / "knep" / "evidence" / "about.yaml"
    changes: Mapping[Path, Callable[[str], str]] = {
        source: lambda text: (_with_import if folder.is_dir() else _with_function)(text, slot, stub, words),
        test: lambda text: _with_row(text, slot, stub, words),
        about: lambda text: _with_card(text, slot, name),
    }
    texts = {option: stub.option(f"knep.recipes.{slot}.{words['made']}")}
    if folder.is_dir():
        own = folder / f"{name}.py"
        if own.exists():
            raise InputError(f"{own.relative_to(root)} is there already: take another name")
        code = "\n".join(stub.code(words["made"], _WIDTH))
        texts[own] = f'{stub.module}\n\n__all__ = ["{words["made"]}"]\n\n\n{code}\n'
    for path, change in changes.items():
        try:
            texts[path] = change(_read(path))
        except InputError as error:
            raise InputError(f"{path.relative_to(root)}: {error}") from error
        except (SyntaxError, LookupError, ValueError) as error:
            raise InputError(f"{path.relative_to(root)} is not as knep new expects it: {error}") from error
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)} cannot be read: {error}") from error


def _public(stub: Stub, name: str) -> str:
    """What the trick is called in its module: mine, or Mine where it is a class."""
    return "".join(part.capitalize() for part in name.split("_")) if stub.base else name


def _with_import(text: str, slot: str, stub: Stub, words: Mapping[str, str]) -> str:
    """The head of a slot that is a folder, with the module of the trick, and its name in `__all__`."""
    made, tree = words["made"], ast.parse(text)
    _refuse_taken([made], _bound(tree))
    said = _statement(tree, "__all__")
    lines = text.split("\n")
    names = [json.dumps(word) for word in _sorted([*ast.literal_eval(said.value), made])]
    _exchange(lines, said, _listed("__all__ = [", names, "]"))
    own = f"from knep.recipes.{slot}.{words['name']} import "
    after = [n.end_lineno or 0 for n in tree.body if isinstance(n, ast.ImportFrom) and _line_of(n) < own]
    first = min(n.lineno for n in tree.body if isinstance(n, ast.ImportFrom))
    lines.insert(max(after, default=first - 1), f"{own}{made}")
    return "\n".join(lines)


def _line_of(node: ast.ImportFrom) -> str:
    return f"from {node.module} import "


def _with_function(text: str, slot: str, stub: Stub, words: Mapping[str, str]) -> str:
    """The module with the stub behind its last trick, and its name in `__all__`."""
    made = words["made"]
    tree = ast.parse(text)
    _refuse_taken([made], _bound(tree))
    said = _statement(tree, "__all__")
    known = ast.literal_eval(said.value)
    tricks = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in known]
    last = tricks[-1].end_lineno
    lines = text.split("\n")
    lines[last:last] = ["", "", *stub.code(made, _WIDTH)]
    _exchange(lines, said, _listed("__all__ = [", [json.dumps(word) for word in _sorted([*known, made])], "]"))
    return "\n".join(lines)


def _with_row(text: str, slot: str, stub: Stub, words: Mapping[str, str]) -> str:
    """The slot's test with a formula to fill in, a test of the trick against it, and their row."""
    tree = ast.parse(text)
    rows = _statement(tree, "ROWS")
    test = stub.rows(words, slot)
    imports = next((n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == f"knep.recipes.{slot}"), None)
    wanted = imports is not None and stub.calls_by_name
    names = [f"{words['name']}_by_hand", f"{words['name']}_is_its_formula"]
    _refuse_taken(names, _bound(tree))
    _refuse_taken([words["made"]], _stored(ast.parse(test)) | (_bound(tree) if wanted else set()))
    lines = text.split("\n")
    end = (rows.value.end_lineno or 0) - 1
    if not isinstance(rows.value, ast.Dict) or lines[end] != "}":
        raise LookupError("ROWS is no dict with one row a line")
    lines[end:end] = [f'    "{words["name"]}": {names[1]},']
    lines[rows.lineno - 1 : rows.lineno - 1] = [*test.splitlines(), "", ""]
    if imports is not None and wanted:
        known = [alias.name for alias in imports.names]
        _exchange(lines, imports, _imported(f"from knep.recipes.{slot} import ", _sorted([*known, words["made"]])))
    return "\n".join(lines)


def _with_card(text: str, slot: str, name: str) -> str:
    """about.yaml with the entry that the card is made from, last of its slot."""
    lines = text.split("\n")
    start = lines.index(f"{slot}:") + 1
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("  ")), len(lines))
    if any(line.startswith(f"  {name}:") for line in lines[start:end]):
        raise InputError(f"{slot} has a {name} already: take another name")
    lines.insert(end, f'  {name}: {{not: "FILL IN: where it is the wrong choice."}}')
    return "\n".join(lines)


def _refuse_taken(names: Iterable[str], taken: Collection[str]) -> None:
    for name in names:
        if name in taken:
            raise InputError(f"it has a {name} already: take another name")


def _bound(tree: ast.Module) -> set[str]:
    """What is defined, assigned or imported at the top of a module."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        else:
            found |= _stored(node)
    return found


def _stored(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _statement(tree: ast.Module, name: str) -> Any:
    """The assignment to a name at the top of a module."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    raise LookupError(f"it has no {name}")


def _exchange(lines: list[str], node: ast.stmt, made: tuple[str, list[str]]) -> None:
    """A statement above all other changes: in one line where it was one and still fits, else a line for each name."""
    one, many = made
    whole = node.lineno == node.end_lineno and len(one) <= _WIDTH
    lines[node.lineno - 1 : node.end_lineno] = [one] if whole else many


def _listed(opened: str, names: list[str], closed: str) -> tuple[str, list[str]]:
    """A list in one line, and in a line for each name."""
    return f"{opened}{', '.join(names)}{closed}", [opened, *(f"    {name}," for name in names), closed]


def _imported(head: str, names: list[str]) -> tuple[str, list[str]]:
    return f"{head}{', '.join(names)}", _listed(f"{head}(", names, ")")[1]


def _sorted(names: list[str]) -> list[str]:
    """As ruff sorts: CONSTANTS, then Classes, then the rest; digits by their number."""

    def key(name: str) -> tuple[int, list[str | int]]:
        kind = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
        return kind, [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    return sorted(names, key=key)


def _write(texts: Mapping[Path, str]) -> None:
    """All files, or none: what was written before one that cannot be is put back."""
    before = {path: path.read_bytes() if path.exists() else None for path in texts}
    try:
        for path, text in texts.items():
            write_atomic(path, text)
    except BaseException as error:
        for path, old in before.items():
            if old is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != old:
                write_atomic(path, old)
        if isinstance(error, OSError) and not is_full(error):
            raise InputError(f"{error.filename} cannot be written ({error.strerror}); nothing was") from error
        raise


def _next_steps(slot: str, name: str, paths: list[str]) -> str:
    measured = slot in SLOTS  # no ledger of images measures what a task learns
    ledger = f"knep ledger slots={slot} && " if measured else ""
    what = "its number and its card" if measured else "its card"
    return "\n".join(
        [
            *(f"written: {path}" for path in paths),
            f"\n{slot}={name} does nothing yet, and its test fails until it does what its formula says. Next:",
            f'1. grep -n "FILL IN" {" ".join(paths)}',
            "   and write what stands there: the trick, its formula in the test, when to use it and when not",
            f"2. pytest tests/recipes/test_{slot}.py -k {name}",
            "3. pytest tests/test_walker.py tests/test_new_trick.py      # nothing is missing, nothing left to fill in",
            f"4. {ledger}knep cards && knep cards --readme --write      # {what}",
            "5. a line in CHANGELOG.md; CONTRIBUTING.md says how a commit looks",
        ]
    )

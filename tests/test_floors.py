"""The rule of the house: a room imports rooms that stand lower, never one beside or above it; and no circle is left."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "knep"
FLOORS = (
    "errors version",
    "utils",
    "nn io",
    "surgery config tasks",
    "optim",
    "observe models data",
    "recipes",
    "guard distributed",
    "engine",
    "ensemble",
    "run export",
    "doctor",
    "evidence",
    "cli",
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path):
    """The modules of knep that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "knep":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "knep")


IMPORTS = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def room(module):
    return module.split(".")[1]


def test_no_room_imports_one_beside_or_above_it():
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if name != "knep" and room(name) != room(other) and FLOOR[room(name)] <= FLOOR[room(other)]
    ]
    assert wrong == []


def test_no_circle_is_left():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError with the way round


def test_every_folder_says_what_lives_there_and_has_no_more_than_sixteen_modules():
    for folder in {path.parent for path in MODULES.values()}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= (8 if folder == PACKAGE else 16), folder
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder

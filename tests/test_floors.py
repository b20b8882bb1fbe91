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


# What a library offers under no public name; `_replace` and `_fields` of tuples are documented.
OF_TORCH = """
    _BatchNorm _ConvNd _forward_pre_hooks _iterator _last_lr _modules _orig_mod _parameters _standard_gamma _version
"""
OF_LIGHTNING = """
    _average_model _checkpoint_connector _combined_loader _data_fetcher _duration _evaluate_stopping_criteria
    _every_n_train_steps _first_loop_iter _kwargs _launcher _load_combined_loader_states _logger_connector
    _monitor_candidates _num_ready_batches_reached _restarting _results _save_topk_checkpoint _should_accumulate
    _should_skip_saving_checkpoint _skip_next_val _swap_models _train_time_interval _val_check_time_interval
"""
OF_OTHERS = """
    _SubParsersAction _Unpickler _actions _apply_overrides_to_config _exit _fields _get_file_writer _getframe
    _option_string_actions _replace _set_parent
"""
OF_LIBRARIES = {*OF_TORCH.split(), *OF_LIGHTNING.split(), *OF_OTHERS.split()}


def taken(path):
    """The private names, read or written, that a file does not define itself."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    own = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    set_here = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    own |= {n.attr for n in set_here if isinstance(n.value, ast.Name) and n.value.id in ("self", "cls")}
    own |= {k.value for n in nodes if isinstance(n, ast.Dict) for k in n.keys if isinstance(k, ast.Constant)}
    names = {n.attr for n in nodes if isinstance(n, ast.Attribute)} - own
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("knep"):
            names |= {alias.name for alias in node.names}
    return {n for n in names if n.startswith("_") and not n.endswith("__") and not n.startswith("_foreach_")}


def test_no_module_takes_a_private_name_of_another():
    found = {name: taken(path) for name, path in MODULES.items()}
    assert {name: names - OF_LIBRARIES for name, names in found.items() if names - OF_LIBRARIES} == {}
    assert set().union(*found.values()) >= OF_LIBRARIES  # what nobody takes any more leaves the list

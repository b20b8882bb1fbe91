"""Putting a module into another one's forward without renaming anything: what `dropout` is made of.

The module's class is swapped for a subclass made on the fly, as `torch.nn.utils.parametrize` does: the module stays
the same object, its parameters and their names stay, and the new one is a child of it. Copies and pickles work.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

# A node of a graph, and the node that is to read it changed; None for all that read it.
Spot = tuple[fx.Node, fx.Node | None]


class _Edit(NamedTuple):
    """What a class was made of: the class below (or its own _Edit), the place, the child's name, generated code."""

    base: Any
    place: str
    child: str
    source: str
    names: tuple[tuple[str, Any], ...]
    evaluated: tuple[str, tuple[tuple[str, Any], ...]] | None = None  # code and names of the forward in eval mode


def put_before(module: nn.Module, new: nn.Module, name: str) -> str:
    """Let `new` change the first input of `module`. Returns the name under which it is a child."""
    return _swap(module, new, name, "before")


def put_behind(module: nn.Module, new: nn.Module, name: str) -> str:
    """Let `new` change the output of `module`, one tensor. Returns the name under which it is a child."""
    return _swap(module, new, name, "behind")


def put_inside(
    module: nn.Module,
    new: nn.Module,
    name: str,
    graph: fx.Graph,
    spots: list[Spot],
    evaluated: tuple[fx.Graph, list[Spot]] | None = None,
) -> str:
    """Let `new` change what the module's own graph computes at these spots. Returns its name as a child.

    The graph is run in training only; in eval mode the module's own forward is, so that what a forward does in one
    mode alone is kept. graph: of `knep.surgery.graph.graph_of`, in training mode; it is edited.
    evaluated: the graph of eval mode, and the same spots there, for what acts in both.
    """
    child = _free(module, name)
    _call_at(child, graph, spots)
    if evaluated is None:
        return _swap(module, new, child, "inside", *_code(graph))
    _call_at(child, *evaluated)
    return _swap(module, new, child, "inside", *_code(graph), evaluated=_code(evaluated[0]))


def _call_at(child: str, graph: fx.Graph, spots: list[Spot]) -> None:
    for node, reader in spots:
        with graph.inserting_after(node):
            call = graph.call_module(child, (node,))
        for user in list(node.users) if reader is None else [reader]:
            if user is not call:
                user.replace_input_with(node, call)


def inserted(module: nn.Module) -> list[nn.Module]:
    """The modules that this file's functions put into the module, in this order."""
    edit, found = getattr(type(module), "knep_edit", None), []
    while isinstance(edit, _Edit):
        found.append(module.get_submodule(edit.child))
        edit = getattr(edit.base, "knep_edit", edit.base)
    return found[::-1]


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    """The forward that the graph describes: a function of the module and its arguments."""
    return _compiled(*_code(graph))


def _code(graph: fx.Graph) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Source of the graph and the names that it refers to, those of packages left out: `torch` is enough."""
    code = graph.python_code("self")
    return code.src, tuple((k, v) for k, v in code.globals.items() if not isinstance(v, ModuleType))


def _compiled(source: str, names: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    space = {"torch": torch, **dict(names)}
    exec(compile(source, "<torch.fx>", "exec"), space)
    return space["forward"]


def _swap(
    module: nn.Module, new: nn.Module, name: str, place: str, source: str = "", names: tuple = (), evaluated: Any = None
) -> str:
    child = _free(module, name)
    like = next(module.parameters(), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    module.add_module(child, new.train(module.training))
    module.__class__ = _subclass(_Edit(type(module), place, child, source, names, evaluated))
    return child


def _free(module: nn.Module, name: str) -> str:
    """The name, or name_2 and so on where the module has an attribute of that name."""
    count, free = 1, name
    while hasattr(module, free):
        count += 1
        free = f"{name}_{count}"
    return free


def _subclass(edit: _Edit) -> type[nn.Module]:
    base = _subclass(edit.base) if isinstance(edit.base, _Edit) else edit.base

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return (_blank, (_by_value(edit),), *base.__reduce_ex__(self, protocol)[2:])

    body = {"forward": _forward(base, edit), "__reduce_ex__": reduce, "__module__": base.__module__, "knep_edit": edit}
    return type(base.__name__, (base,), body)


def _by_value(edit: _Edit) -> _Edit:
    """The edit with nothing but classes that a pickle can name."""
    base = vars(edit.base).get("knep_edit", edit.base) if isinstance(edit.base, type) else edit.base
    return edit._replace(base=_by_value(base) if isinstance(base, _Edit) else base)


def _blank(edit: _Edit) -> nn.Module:
    cls = _subclass(edit)
    return cls.__new__(cls)


def _forward(base: type[nn.Module], edit: _Edit) -> Callable[..., Any]:
    own = base.forward
    generated = _compiled(edit.source, edit.names) if edit.place == "inside" else own
    evaluated = own if edit.evaluated is None else _compiled(*edit.evaluated)

    def before(self: nn.Module, input: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, getattr(self, edit.child)(input), *args, **kwargs)

    def behind(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, edit.child)(own(self, *args, **kwargs))

    def inside(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (generated if self.training else evaluated)(self, *args, **kwargs)

    return functools.wraps(own)({"before": before, "behind": behind, "inside": inside}[edit.place])

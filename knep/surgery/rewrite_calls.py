"""Activations that a forward calls as functions (F.relu(x), torch.relu(x), x.relu()) turned into child modules.

A model's own code says where: in the source of a module's methods, each call of an activation function is found, and
the module's class is exchanged for a subclass made on the fly, as `torch.nn.utils.parametrize` does, whose methods
call a child there. Only these calls change: branches, loops and default arguments stay as written, which a torch.fx
graph, being one trace, cannot promise (it fixes what `if self.training` or `if mask is None` gave while tracing).
Names and state-dict keys stay too, for the children have no parameters. Copies and pickles know the children.

Out of reach: calls in functions outside a module's class or in a base class's method called by super(), code without
source, fx.GraphModule, scripted and compiled code.
"""

import __future__

import ast
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

from knep.surgery.watch import FUNCTIONS

Children = Mapping[tuple[str, int], tuple[str, bool]]

_METHODS = {f.__name__: f for f in FUNCTIONS if getattr(Tensor, f.__name__, None) is f}
_ANNOTATIONS = __future__.annotations.compiler_flag


@dataclass(frozen=True)
class Site:
    """One call of an activation function in the source of a method: the method, and the call's number among its calls.

    inplace: it overwrites its input. old: the module that does the same, if all further arguments are constants.
    """

    method: str
    number: int
    function: Callable[..., Tensor]
    inplace: bool
    old: nn.Module | None


def sites_of(module: nn.Module) -> list[Site]:
    """The calls of activation functions in the methods of the module's class that can become children."""
    if "forward" in vars(module) or isinstance(module, fx.GraphModule):
        return []
    return [site for name, fn in _methods(own_class(module)) for site in _sites(name, fn)]


def is_function(value: object) -> bool:
    """Whether a value is an activation function, other than prelu, whose slopes are its caller's parameters."""
    known = callable(value) and type(value).__hash__ is not None and value in FUNCTIONS
    return known and FUNCTIONS[value] is not nn.PReLU


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module was built with."""
    return getattr(type(module), "_own_class", type(module))


def children_of(module: nn.Module) -> Children:
    """(method, number of the call) -> the child that is called there by now, and whether with all arguments."""
    return dict(getattr(type(module), "_called_children", ()))


def exchange(module: nn.Module, children: Children) -> None:
    """Makes the methods call these children, with the first argument or with all; other calls are as in the source."""
    base = own_class(module)
    module.__class__ = _subclass(base, tuple(sorted(children.items()))) if children else base


@cache
def _subclass(base: type[nn.Module], children: tuple[Any, ...]) -> type[nn.Module]:
    methods: dict[str, dict[int, tuple[str, bool]]] = {}
    for (method, number), child in children:
        methods.setdefault(method, {})[number] = child
    body: dict[str, Any] = {m: _rewritten(inspect.getattr_static(base, m), calls) for m, calls in methods.items()}
    body |= {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"_own_class": base, "_called_children": children, "__reduce_ex__": _reduce}
    metaclass: Any = type(base)
    return metaclass(base.__name__, (base,), body)


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _empty, (type(self)._own_class, type(self)._called_children), state


def _empty(base: type[nn.Module], children: tuple[Any, ...]) -> nn.Module:
    cls = _subclass(base, children)
    return cls.__new__(cls)


def _methods(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    """(name, function) of what the class and its bases outside torch define, as it is called by name."""
    classes = [c for c in cls.__mro__ if not c.__module__.startswith("torch.") and c is not object]
    for name in dict.fromkeys(name for c in classes for name in vars(c)):
        fn = inspect.getattr_static(cls, name)
        if isinstance(fn, FunctionType) and fn.__code__.co_argcount and not name.startswith("__"):
            yield name, fn


@cache
def _sites(name: str, fn: FunctionType) -> list[Site]:
    tree = _source(fn)
    if tree is None:
        return []
    lost = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and not _is_named(node.value)}
    sites = []
    for number, call in enumerate(_calls(tree)):
        function = _function(call, fn)
        if function and id(call) not in lost and (arguments := _arguments(call)):
            sites.append(Site(name, number, function, *_constants(FUNCTIONS[function], function, arguments[1:])))
    return sites


def _source(fn: FunctionType) -> ast.FunctionDef | None:
    """The function's syntax tree, if there is a source and it is the one that was compiled."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn.__code__))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    tree.decorator_list = []
    return tree if _words(_compiled(ast.unparse(tree), fn, "<source>")) == _words(fn.__code__) else None


def _words(code: CodeType) -> tuple[Any, ...]:
    """What a function names, in order: not its bytecode, which depends on the imports around it."""
    numbers = [c for c in code.co_consts if isinstance(c, (int, float))]
    return code.co_name, code.co_names, code.co_varnames, code.co_freevars, numbers


def _compiled(text: str, fn: FunctionType, filename: str) -> CodeType:
    """The code of a method's source, with the names that the original takes from around it, and those of its class."""
    owner = fn.__qualname__.split(".")[-2] if "." in fn.__qualname__ else "_"
    free = ", ".join(name for name in fn.__code__.co_freevars if name != "__class__")
    lines = [f"def _around({free}):", f" class {owner.strip('<>')}:", textwrap.indent(text, "  ")]
    source = "\n".join(lines) + "\n"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    flags = fn.__code__.co_flags & _ANNOTATIONS
    code = compile(source, filename, "exec", flags=flags, dont_inherit=True)
    for _ in range(3):  # the function around, the class, the method
        code = next(c for c in code.co_consts if isinstance(c, CodeType))
    return code


def _calls(tree: ast.AST) -> list[ast.Call]:
    """The calls in a tree in the order of the text."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset, call.end_col_offset))


def _function(call: ast.Call, fn: FunctionType) -> Callable[..., Tensor] | None:
    """The activation function that is called, if one is."""
    found = _value(call.func, fn)
    if found is None and isinstance(call.func, ast.Attribute) and not (call.args or call.keywords):
        root = call.func.value
        while isinstance(root, ast.Attribute):
            root = root.value
        is_own = isinstance(root, ast.Name) and root.id == fn.__code__.co_varnames[0]
        found = None if is_own else _METHODS.get(call.func.attr)
    return found if is_function(found) else None


def _value(node: ast.expr, fn: FunctionType) -> Any:
    """What a dotted name stands for, if that is settled before the function runs; else None."""
    if isinstance(node, ast.Attribute):
        room = _value(node.value, fn)
        return getattr(room, node.attr, None) if isinstance(room, (ModuleType, type)) else None
    if not isinstance(node, ast.Name) or node.id in (*fn.__code__.co_varnames, *fn.__code__.co_cellvars):
        return None
    if node.id in fn.__code__.co_freevars:
        cell = (fn.__closure__ or ())[fn.__code__.co_freevars.index(node.id)]
        return cell.cell_contents if node.id != "__class__" else None
    return fn.__globals__.get(node.id)


def _arguments(call: ast.Call) -> list[ast.expr | ast.keyword] | None:
    """The arguments, the signal first; None for what cannot be told apart (starred ones, an output to write to)."""
    names = {k.arg for k in call.keywords}
    if None in names or "out" in names or any(isinstance(a, ast.Starred) for a in call.args):
        return None
    if isinstance(call.func, ast.Attribute) and not (call.args or call.keywords):
        return [call.func.value]
    if call.args:
        return [*call.args, *call.keywords]
    signal = next((k for k in call.keywords if k.arg == "input"), None)
    return [signal.value, *(k for k in call.keywords if k is not signal)] if signal else None


def _constants(
    cls: type[nn.Module], function: Callable[..., Tensor], rest: list[ast.expr | ast.keyword]
) -> tuple[bool, nn.Module | None]:
    """Whether the call works in place, and the module that does the same if all arguments are constants."""
    args = [a.value for a in rest if isinstance(a, ast.Constant)]
    named = {
        str(k.arg): k.value.value for k in rest if isinstance(k, ast.keyword) and isinstance(k.value, ast.Constant)
    }
    constant = len(args) + len(named) == len(rest)
    old = cls(*args, **named) if constant and cls is not nn.RReLU else None
    inplace = function.__name__.endswith("_") or named.get("inplace") is True or getattr(old, "inplace", False)
    if old is not None and hasattr(old, "inplace"):
        setattr(old, "inplace", inplace)  # noqa: B010
    return inplace, old


def _is_named(node: ast.expr) -> bool:
    """Whether a call that stands alone, for its effect in place, acts on a variable, which then can be assigned."""
    signal = _arguments(node) if isinstance(node, ast.Call) else None
    return bool(signal) and isinstance(signal[0], ast.Name)


class _Rewriting(ast.NodeTransformer):
    def __init__(self, owner: str, children: Mapping[ast.Call, tuple[str, bool]]) -> None:
        self.owner, self.children = owner, children

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        signal = _arguments(call) if isinstance(call, ast.Call) and call in self.children else None
        self.generic_visit(node)
        if signal and isinstance(signal[0], ast.Name):
            return ast.Assign([ast.Name(signal[0].id, ast.Store())], node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        child = self.children.get(node)
        self.generic_visit(node)
        if child is None:
            return node
        arguments = _arguments(node) or []
        passed = [a for a in arguments if not isinstance(a, ast.keyword)][: None if child[1] else 1]
        keywords = [a for a in arguments if isinstance(a, ast.keyword)] if child[1] else []
        target = ast.Attribute(ast.Name(self.owner, ast.Load()), child[0], ast.Load())
        return ast.Call(target, passed, keywords)


def _rewritten(fn: FunctionType, children: Mapping[int, tuple[str, bool]]) -> FunctionType:
    """The function, with other calls: same globals, closure, defaults and attributes."""
    tree = _source(fn)
    assert tree is not None, "the source was there when the calls were found"
    calls = {call: children[i] for i, call in enumerate(_calls(tree)) if i in children}
    new = ast.fix_missing_locations(_Rewriting(fn.__code__.co_varnames[0], calls).visit(tree))
    text = ast.unparse(new)
    code = _compiled(text, fn, f"<knep {fn.__module__}.{fn.__qualname__} {hash(text):x}>")
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    made = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, tuple(cells[n] for n in code.co_freevars))
    made.__kwdefaults__, made.__annotations__, made.__doc__ = fn.__kwdefaults__, fn.__annotations__, fn.__doc__
    made.__qualname__, made.__module__ = fn.__qualname__, fn.__module__
    made.__dict__.update(vars(fn))
    return made

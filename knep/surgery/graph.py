"""Each module's own forward as a graph.

A module is traced alone, its children as leaves, so that one forward that `torch.fx` cannot read spoils no other.
"""

import inspect
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from knep.errors import InputError
from knep.surgery.record import BENDS, BENDS_OR_GATES, mode, name_of

_PLAIN = (type(None), bool, int, float, str)


class _Alone(fx.Tracer):
    """Enters no child."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def graph_of(module: nn.Module, training: bool = True, given: dict[str, Any] | None = None) -> fx.Graph | str:
    """What the module's own forward computes in this mode, or the reason, one line, why it cannot be read.

    Optional arguments stand for their defaults, which the generated code asserts, or for what is `given`.
    """
    before = set(vars(module))
    optional = _optional(module, given or {})
    try:
        with mode(module, training):
            graph = _Alone().trace(module, concrete_args=optional or None)
    except Exception as error:  # torch.fx raises whatever the module's own forward raises on a proxy
        return " ".join(str(error).split())
    finally:
        made = set(vars(module)) - before
        for name in made:
            delattr(module, name)
    if made:
        return "its forward makes a tensor or keeps a value of its own"
    for node in graph.find_nodes(op="placeholder"):
        name = node.target.removesuffix("_1")
        node.target = name if name in optional else node.target
    return graph


def _optional(module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the forward that are fixed while it is traced."""
    optional = {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        value = given.get(name, parameter.default)
        if parameter.default is not inspect.Parameter.empty and isinstance(value, _PLAIN):
            optional[name] = value
    return optional


def own_parts(graph: fx.Graph) -> Counter[str]:
    """How often a graph calls each child."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def is_sum(node: fx.Node) -> bool:
    """Whether the node adds two computed signals."""
    named_so = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    method = node.op == "call_method" and node.target in ("add", "add_")
    return (named_so or method) and len(terms(node)) == 2


def terms(node: fx.Node) -> list[fx.Node]:
    """The two signals of an addition, of its keywords too."""
    values = (*node.args[:2], node.kwargs.get("other"))
    return [v for v in values if isinstance(v, fx.Node)]


def bend_of(node: fx.Node) -> str | None:
    """The name of the activation function that the node calls."""
    if node.op == "call_function":
        name = name_of(node.target)
        torchs = getattr(node.target, "__module__", None) in (F.__name__, "torch._C._nn", "torch", None)
        return name if torchs and name in (*BENDS, *BENDS_OR_GATES) else None
    if node.op == "call_method" and str(node.target) in (*BENDS, *BENDS_OR_GATES):
        return str(node.target)
    return None


def refuse_scripted(model: nn.Module, slot: str) -> None:
    """InputError, naming the module, where a part is TorchScript, whose forward cannot be edited."""
    for path, m in model.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            raise InputError(
                f"{slot} cannot edit {path or 'the model'}, it is TorchScript: apply the recipe before scripting"
            )

"""Residual branches of any model, proved by the graph of each module's own forward.

A sum is residual where all its terms start from one signal. If one of them is that signal, the others are branches.
Else the shortcut is the term with the fewest weight matrices, or with no parameter where none has a matrix, if each of
its steps reads one signal only, as in a projection; what no rule tells is not proved. A branch holds parameters.
"""

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torchvision import ops

from knep.nn.kinds import adapters
from knep.nn.place import Place
from knep.surgery.edit import Change, describe, modules_of, replace
from knep.surgery.graph import graph_of, is_sum, own_parts, terms
from knep.surgery.insert_module import Spot, function_of, inserted, put_behind, put_inside
from knep.surgery.record import Pass, same_in_training
from knep.surgery.sample import Inputs

_LEFT = "left as it is: "
# torch's own blocks, whose forwards torch.fx cannot read, and the modules that end their branches.
_TORCHS_OWN = {
    nn.TransformerEncoderLayer: ("dropout1", "dropout2"),
    nn.TransformerDecoderLayer: ("dropout1", "dropout2", "dropout3"),
}


def drops_branches(module: nn.Module) -> bool:
    """Whether the module is a stochastic depth, torchvision's or one of that name, such as timm's DropPath."""
    return isinstance(module, ops.StochasticDepth) or type(module).__name__ in ("StochasticDepth", "DropPath")


@dataclass(frozen=True)
class Branch:
    """The end of a residual branch: a layer to put something behind, or a node in the forward of `owner`.

    inside: the graph of that forward, the node and the sum that reads it.
    order: later branches have the larger, by the modules that act before.
    evaluated: as inside, in eval mode; None where nobody asked, or where that forward is another one.
    layers: the modules that act in the branch and nowhere else in that forward.
    """

    path: str
    owner: nn.Module
    end: nn.Module | None
    order: int
    inside: tuple[fx.Graph, fx.Node, fx.Node] | None = None
    evaluated: tuple[fx.Graph, fx.Node, fx.Node] | None = None
    layers: tuple[nn.Module, ...] = ()


class Residuals:
    """The residual branches of a model that no stochastic depth ends yet, and what is left: path -> reason.

    scaled: for what is to act in eval mode as well, on all branches: those that a stochastic depth ends too.
    sample: images (N, C, H, W): orders branches by execution, leaves out what is not called, checks what is rewritten.
    Without it the order is that of registration.
    """

    def __init__(self, model: nn.Module, sample: Inputs | None, scaled: bool = False) -> None:
        self.model, self.scaled = model, scaled
        self._in_eval: dict[nn.Module, fx.Graph | str] = {}
        self.seen = None if sample is None else Pass(model, sample)
        self.names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self.place = {m: i for i, m in enumerate(model.modules())}
        self.owners = {child: m for m in model.modules() for child in inserted(m)}
        self.branches: list[Branch] = []
        self.left: dict[str, str] = {}
        self.adapters = adapters(model)
        for path, module in model.named_modules():
            if self._worth_reading(module):
                self._read(path, module)
        if sample is not None:
            self._verify(sample)

    def order_of(self, module: nn.Module) -> int | None:
        """When the module is first called, None for never; without a sample its place among all modules."""
        if self.seen is None:
            return self.place[module]
        owner = self.owners.get(module)  # in eval mode it may not call what was put into it
        return self.seen.start.get(module) if owner is None else self.seen.end.get(owner)

    def _worth_reading(self, module: nn.Module) -> bool:
        plain = type(module).forward in (nn.Sequential.forward, nn.Module.forward)
        if plain or isinstance(module, nn.MultiheadAttention) or self.order_of(module) is None:
            return False
        if module in self.adapters:  # the correction of a layer is no branch that may be skipped
            return False
        return any(module.children()) or any(p.dim() > 1 for p in module.parameters())

    def _read(self, path: str, module: nn.Module) -> None:
        for kind, names in _TORCHS_OWN.items():
            if type(module).forward is kind.forward:
                return self._read_torchs_own(path, module, names)
        graph = graph_of(module, given=self.seen.given[module] if self.seen else None)
        if isinstance(graph, str):
            if self.seen is None or module in self.seen.adds:
                self.left[path] = f"torch.fx cannot read its forward: {graph}"
            return None
        sums = [node for node in graph.nodes if is_sum(node)]
        if not sums and self.seen and module in self.seen.adds:
            self.left[path] = "torch.fx does not see the sum that its forward takes"
        for node in sums:
            if not any(is_sum(user) and len(node.users) == 1 for user in node.users):
                self._judge(path, module, graph, node)
        return None

    def _read_torchs_own(self, path: str, module: nn.Module, names: tuple[str, ...]) -> None:
        for name in names:
            end = module.get_submodule(name)
            if self.scaled or not any(map(drops_branches, end.modules())):
                order = self.order_of(module) or 0
                self.branches.append(Branch(f"{path}.{name}".lstrip("."), module, end, order))

    def _judge(self, path: str, module: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
        flat = _flat(node)
        parts = [term for term, _ in flat]
        above = [_above(term) for term in parts]
        common = set.intersection(*above)
        if not any(n.op != "get_attr" for n in common):
            return
        only = [mine - set.union(*(a for j, a in enumerate(above) if j != i)) for i, mine in enumerate(above)]
        held = [_parameters(module, nodes) for nodes in only]
        sizes = [(_matrices(module, nodes), holds) for nodes, holds in zip(only, held, strict=True)]
        signal = [all(term in a for a in above) for term in parts]
        if signal.count(True) == 1:
            shortcut = signal.index(True)
        elif sizes.count(min(sizes)) == 1 and _is_chain(only[sizes.index(min(sizes))]):
            shortcut = sizes.index(min(sizes))
        else:
            if any(held):
                self.left[path] = f"which side of the sum {node.name} is the shortcut cannot be told"
            return
        for i, (term, reader) in enumerate(flat):
            if i != shortcut and held[i] and not self._dropped(module, only[i]):
                branch = self._branch(path, module, graph, term, reader, only[i])
                if branch.end is None and self.seen is None and _asks_types(module):
                    self.left[path] = "its forward asks for types, which needs a sample to be read rightly"
                else:
                    self.branches.append(branch)

    def _dropped(self, module: nn.Module, nodes: set[fx.Node]) -> bool:
        if self.scaled:
            return False
        called = [module.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"]
        return any(drops_branches(m) for child in called for m in child.modules())

    def _branch(
        self, path: str, owner: nn.Module, graph: fx.Graph, node: fx.Node, reader: fx.Node, only: set[fx.Node]
    ) -> Branch:
        before = [n for n in _above(node) if n.op == "call_module"]
        ends = [self._last(owner.get_submodule(str(n.target))) for n in before]
        order = max((o for m in ends if (o := self.order_of(m)) is not None), default=self.order_of(owner) or 0)
        end = None
        if node.op == "call_module" and len(node.users) == 1 and own_parts(graph)[str(node.target)] == 1:
            last = owner.get_submodule(str(node.target))
            end = self._end(owner, last)
            if end is None and self.scaled and self._belongs(owner, last):
                end = last
        where = next((p for p, m in modules_of(self.model, nn.Module) if m is end), path) if end else path
        layers = tuple(owner.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module" and n in only)
        evaluated = self._evaluated(owner, node, reader) if self.scaled and end is None else None
        return Branch(where, owner, end, order, (graph, node, reader), evaluated, layers)

    def _evaluated(self, owner: nn.Module, node: fx.Node, reader: fx.Node) -> tuple[fx.Graph, fx.Node, fx.Node] | None:
        """The same two nodes in the forward of eval mode, by their names."""
        if owner not in self._in_eval:
            given = self.seen.given[owner] if self.seen else None
            self._in_eval[owner] = graph_of(owner, training=False, given=given)
        graph = self._in_eval[owner]
        names = {} if isinstance(graph, str) else {n.name: n for n in graph.nodes}
        found = [n for one in (node, reader) if (n := names.get(one.name)) is not None and n.target == one.target]
        return (graph, *found) if len(found) == 2 and not isinstance(graph, str) else None  # type: ignore[return-value]

    def _last(self, module: nn.Module) -> nn.Module:
        """The part of the module that is called last."""
        return max(module.modules(), key=lambda m: -1 if (o := self.order_of(m)) is None else o)

    def _end(self, owner: nn.Module, module: nn.Module) -> nn.Module | None:
        """The layer that ends `module`, if it acts there and nowhere else."""
        while type(module).forward is nn.Sequential.forward and len(module) and self._belongs(owner, module):  # type: ignore[arg-type]
            module = module[-1]  # type: ignore[index]
        return None if any(module.children()) or not self._belongs(owner, module) else module

    def _belongs(self, owner: nn.Module, module: nn.Module) -> bool:
        once = self.names[id(module)] == self.names[id(owner)]
        return once and (self.seen is None or self.seen.times[module] == self.seen.times[owner])

    def _verify(self, sample: Inputs) -> None:
        """Leave out what torch.fx reads wrongly of the forwards that would be rewritten."""
        rewritten = {b.owner: function_of(b.inside[0]) for b in self.branches if b.end is None and b.inside}
        wrong = same_in_training(self.model, sample, rewritten) if rewritten else {}
        self.left |= {path: wrong[m] for path, m in self.model.named_modules() if m in wrong}
        self.branches = [b for b in self.branches if b.end is not None or b.owner not in wrong]


def left_alone(model: nn.Module, left: dict[str, str]) -> list[Change]:
    """Changes that say what is left as it is: path -> reason."""
    return [Change(path, type(model.get_submodule(path)).__name__, _LEFT + reason) for path, reason in left.items()]


def end_with(model: nn.Module, branch: Branch, new: nn.Module, name: str) -> Change:
    """Let `new` change the branch before the sum; no parameter gets another name."""
    if branch.end is not None:
        return follow(model, branch.end, new, name)
    assert branch.inside
    graph, node, reader = branch.inside
    evaluated: tuple[fx.Graph, list[Spot]] | None = None
    if branch.evaluated:
        evaluated = (branch.evaluated[0], [branch.evaluated[1:]])
    child = put_inside(branch.owner, new, name, graph, [(node, reader)], evaluated)
    return Change(f"{branch.path}.{child}".lstrip("."), f"{type(branch.owner).__name__}: {node.name}", describe(new))


def follow(model: nn.Module, module: nn.Module, new: nn.Module, name: str) -> Change:
    """Put `new` behind a module that gives one tensor, under every name that it has."""
    paths = [path for path, m in modules_of(model, type(module)) if m is module]
    before, after = describe(module), f"{describe(module)}, {describe(new)}"
    if module is model or any(True for _ in (*module.parameters(), *module.buffers())):
        put_behind(module, new, name)
    else:
        both = nn.Sequential(module, new.train(module.training))
        for path in paths:
            replace(model, path, both)
    return Change(paths[0] if paths else "", before, after)


def has_places(model: nn.Module) -> bool:
    """Whether the model has places for tricks, as knep's own models have."""
    return any(True for _ in modules_of(model, Place))


def _asks_types(module: nn.Module) -> bool:
    """Whether the forward branches on what torch.fx hides: to it no signal is a tensor."""
    return bool({"isinstance", "is_tensor", "type"} & set(inspect.unwrap(type(module).forward).__code__.co_names))


def _flat(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The terms of a sum of sums, each with the addition that reads it."""
    parts: list[tuple[fx.Node, fx.Node]] = []
    for term in terms(node):
        parts += _flat(term) if is_sum(term) and len(term.users) == 1 else [(term, node)]
    return parts


def _above(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from; items of an input are inputs of their own."""
    seen, todo = set(), [node]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            drawn = _name(n).endswith("_like")  # reads a shape, and no signal
            if not drawn and not (_name(n) == "getitem" and n.all_input_nodes[0].op == "placeholder"):
                todo.extend(n.all_input_nodes)
    return seen


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _is_chain(nodes: set[fx.Node]) -> bool:
    """Whether each step reads one signal: what was computed, constants and parameters aside."""
    return all(sum(n.op != "get_attr" for n in node.all_input_nodes) <= 1 for node in nodes)


def _tensors(module: nn.Module, nodes: set[fx.Node]) -> list[Any]:
    found: list[Any] = []
    for n in nodes:
        if n.op == "call_module":
            found += module.get_submodule(str(n.target)).parameters()
        elif n.op == "get_attr":
            path, _, name = str(n.target).rpartition(".")
            found.append(getattr(module.get_submodule(path), name))
    return found


def _matrices(module: nn.Module, nodes: set[fx.Node]) -> int:
    """How many weight matrices the nodes hold."""
    return sum(isinstance(t, Tensor) and t.dim() > 1 for t in _tensors(module, nodes))


def _parameters(module: nn.Module, nodes: set[fx.Node]) -> bool:
    return any(isinstance(t, nn.Parameter) for t in _tensors(module, nodes))

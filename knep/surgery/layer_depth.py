"""How deep in a model each parameter acts, measured by the autograd graph of one forward pass.

Depth counts layers with weights on the longest path from the input: parallel branches are no deeper than the longer
one, whatever the order in which modules are registered, and functions count as modules do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from knep.surgery.record import mode
from knep.surgery.sample import Inputs, call, mapped, ready

_Node = Any  # of autograd


def depths_of(model: nn.Module, sample: Inputs, weighs: Callable[[Tensor], bool]) -> dict[int, int]:
    """id of each parameter -> layers with weights before it; parameters that reach no output are left out.

    A weight has the number of layers with weights in front of its own; what has no weights, such as a norm or a class
    token, the depth of the layer before it, or 0. Used at several depths, a parameter has the least. The model reads
    two images in eval mode.

    weighs: whether a parameter makes what uses it a layer.
    """
    flags = {p: p.requires_grad for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    try:
        for p in flags:
            p.requires_grad_(True)  # frozen layers are as deep as trained ones
        return _walk(model, _outputs(model, sample), weighs)
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


def _outputs(model: nn.Module, sample: Inputs) -> list[_Node]:
    images = mapped(ready(model, sample), _leaf)
    with torch.enable_grad(), mode(model, False):
        output = call(model, images)
    return [t.grad_fn for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]


def _leaf(images: Tensor) -> Tensor:
    """A copy that the graph begins with."""
    copy = images.detach().clone()
    return copy.requires_grad_(True) if copy.is_floating_point() else copy


def _walk(model: nn.Module, roots: list[_Node], weighs: Callable[[Tensor], bool]) -> dict[int, int]:
    own = {id(p) for p in model.parameters()}
    # A node of parameters alone holds them, until a node of the signal reads it.
    holds: dict[_Node, list[Tensor]] = {}
    reached: dict[_Node, int] = {}
    depths: dict[int, int] = {}
    for node in _in_order(roots):
        before = [n for n, _ in node.next_functions if n is not None]
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) in own:
                holds[node] = [variable]
            else:
                reached[node] = 0  # the images
            continue
        used = [p for n in before for p in holds.get(n, [])]
        signal = [reached[n] for n in before if n in reached]
        if not signal and not node.name().startswith("Embedding"):
            holds[node] = used
            continue
        reached[node] = max(signal, default=0) + any(weighs(p) for p in used)
        for p in used:
            depths[id(p)] = min(depths.get(id(p), reached[node]), reached[node])
    for node in roots:
        depths |= {id(p): 1 for p in holds.get(node, []) if id(p) not in depths}
    return {key: max(depth - 1, 0) for key, depth in depths.items()}


def _in_order(roots: list[_Node]) -> list[_Node]:
    """The nodes of the graph, each behind all that it is computed from."""
    order: list[_Node] = []
    done: set[_Node] = set()
    todo = [(node, False) for node in roots]
    while todo:
        node, ready_now = todo.pop()
        if ready_now:
            order.append(node)
        elif node not in done:
            done.add(node)
            todo.append((node, True))
            todo += [(n, False) for n, _ in node.next_functions if n is not None and n not in done]
    return order

"""Where a model bends feature maps (N, C, H, W), by a module or by a function in a forward.

(N, H, W, C) looks the same, so a neighbour must tell: a layer of channels (convolution, pooling, norm of channels)
that made what is bent or reads what comes of it.
"""

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from knep.insert import function_of
from knep.layers import ACTIVATIONS, GATES, RMSNorm
from knep.trace import BENDS_OR_GATES, Bend, Pass, bend_of, graph_of, same_in_training

# Modules whose second axis is channels.
_CHANNELS_FIRST = (
    nn.Conv2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.GroupNorm,
    _BatchNorm,
    _InstanceNorm,
    RMSNorm,
)


@dataclass(frozen=True)
class Bends:
    """Activation modules that only see maps larger than one pixel; in forwards, (path, module, graph, nodes) of those
    that call such functions; and what is left: path -> reason.
    """

    modules: list[nn.Module]
    inside: list[tuple[str, nn.Module, fx.Graph, list[fx.Node]]]
    left: dict[str, str]


def bends_of_maps(model: nn.Module, sample: Tensor) -> Bends:
    """What bends feature maps when the model reads two images of the sample."""
    seen = Pass(model, sample)
    by_channels = [call for call in seen.seen if call.function is None and isinstance(call.module, _CHANNELS_FIRST)]
    read = {id(call.input) for call in by_channels}
    made = {id(call.output) for call in by_channels}

    def good(call: Bend, gate: bool) -> bool:
        shaped = call.output.dim() == 4 and call.output.shape[2:].numel() > 1
        return shaped and (id(call.output) in read or (id(call.input) in made and not gate))

    modules: dict[nn.Module, bool] = {}
    functions: dict[nn.Module, list[tuple[str, bool]]] = {}
    for call in seen.seen:
        if isinstance(call.module, (*ACTIVATIONS, *GATES)):
            if call.function is None:
                always = modules.get(call.module, True)
                modules[call.module] = always and good(call, isinstance(call.module, GATES))
        elif call.function is not None:
            told = good(call, call.function in BENDS_OR_GATES)
            functions.setdefault(call.module, []).append((call.function, told))
    inside, left = _inside(model, seen, functions)
    wrong = same_in_training(model, sample, {m: function_of(graph) for _, m, graph, _ in inside}) if inside else {}
    left |= {path: wrong[m] for path, m, _, _ in inside if m in wrong}
    return Bends(
        [m for m, always in modules.items() if always], [place for place in inside if place[1] not in wrong], left
    )


def _inside(
    model: nn.Module, seen: Pass, functions: dict[nn.Module, list[tuple[str, bool]]]
) -> tuple[list[tuple[str, nn.Module, fx.Graph, list[fx.Node]]], dict[str, str]]:
    """The graphs of forwards that bend maps by functions, with the nodes that do so at every call."""
    inside, left = [], {}
    for path, module in model.named_modules():
        found = functions.get(module, [])
        if not any(told for _, told in found):
            continue
        graph = graph_of(module, given=seen.given[module])
        if isinstance(graph, str):
            left[path] = f"torch.fx cannot read its forward: {graph}"
            continue
        nodes = [(node, name) for node in graph.nodes if (name := bend_of(node))]
        names = [name for _, name in nodes]
        if names * seen.times[module] != [name for name, _ in found]:
            left[path] = "its forward does something else in training"
            continue
        bad = Counter(i % len(names) for i, (_, told) in enumerate(found) if not told)
        inside.append((path, module, graph, [node for i, (node, _) in enumerate(nodes) if not bad[i]]))
    return [place for place in inside if place[3]], left

"""Where a model bends feature maps (N, C, H, W), by a module or by a function in a forward.

(N, H, W, C) looks the same, so a neighbour must tell: a layer of channels (convolution, pooling, norm of channels)
that made what is bent or reads what comes of it. A linear layer or layer norm tells that channels are last, in a model
that turns (N, C, H, W) into (N, H, W, C) somewhere.
"""

from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from knep.nn.kinds import ACTIVATIONS, GATES
from knep.nn.norm import RMSNorm
from knep.surgery.graph import bend_of, graph_of
from knep.surgery.insert_module import function_of
from knep.surgery.record import BENDS_OR_GATES, Bend, Pass, same_in_training
from knep.surgery.sample import Inputs

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


_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


class ChannelsLast(nn.Module):
    """Lets a module of (N, C, H, W) act on (N, H, W, C)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        return type(self.inner).__name__


@dataclass(frozen=True)
class Map:
    """What bends feature maps larger than one pixel at every call: a module or, in its forward, a node of its graph.

    last: whether channels are the last axis, not the second.
    """

    path: str
    module: nn.Module
    last: bool
    graph: fx.Graph | None = None
    node: fx.Node | None = None


def maps_of(model: nn.Module, sample: Inputs) -> tuple[list[Map], dict[str, str]]:
    """What bends maps when the model reads two images of the sample, and what is left as it is: path -> reason."""
    seen = Pass(model, sample)
    paths = {m: path for path, m in model.named_modules()}
    calls: dict[nn.Module, list[tuple[Bend, bool | None]]] = {}
    for call, last in zip(seen.seen, _tell(seen), strict=True):
        by_module = call.function is None and isinstance(call.module, (*ACTIVATIONS, *GATES))
        by_function = call.function is not None and not isinstance(call.module, (*ACTIVATIONS, *GATES))
        if by_module or by_function:
            calls.setdefault(call.module, []).append((call, last))
    found: list[Map] = []
    left: dict[str, str] = {}
    for module, bends in calls.items():
        kinds = {last for _, last in bends}
        if isinstance(module, (*ACTIVATIONS, *GATES)):
            found += [Map(paths[module], module, last) for last in kinds if last is not None and len(kinds) == 1]
        elif kinds != {None}:
            inside = _inside(paths[module], module, seen, bends)
            left |= {paths[module]: inside} if isinstance(inside, str) else {}
            found += [] if isinstance(inside, str) else inside
    rewritten = {place.module: function_of(place.graph) for place in found if place.graph is not None}
    wrong = same_in_training(model, sample, rewritten) if rewritten else {}
    left |= {paths[m]: reason for m, reason in wrong.items()}
    return [place for place in found if place.module not in wrong], left


def _tell(seen: Pass) -> list[bool | None]:
    """For each call whether what it gives is a map with channels last, True, or second, False; None for no map."""
    sides = {}
    for last, kinds in ((False, _CHANNELS_FIRST), (True, _CHANNELS_LAST)):
        layers = [call for call in seen.seen if call.function is None and isinstance(call.module, kinds)]
        sides[last] = {id(call.input) for call in layers}, {id(call.output) for call in layers}

    def side(call: Bend, last: bool) -> bool:
        read, made = sides[last]
        pixels = call.output.shape[1:3] if last else call.output.shape[2:]
        gate = isinstance(call.module, GATES) or call.function in BENDS_OR_GATES
        told = id(call.output) in read or (id(call.input) in made and not gate)
        return call.output.dim() == 4 and pixels.numel() > 1 and told and (seen.to_last or not last)

    return [next((last for last in (False, True) if side(call, last)), None) for call in seen.seen]


def _inside(path: str, module: nn.Module, seen: Pass, bends: list[tuple[Bend, bool | None]]) -> list[Map] | str:
    """The calls of functions in the module's forward that bend maps each time, or why they are not known."""
    graph = graph_of(module, given=seen.given[module])
    if isinstance(graph, str):
        return f"torch.fx cannot read its forward: {graph}"
    nodes = [(node, name) for node in graph.nodes if (name := bend_of(node))]
    if [name for _, name in nodes] * seen.times[module] != [call.function for call, _ in bends]:
        return "its forward does not do the same in training and in eval mode"
    kinds = [{last for _, last in bends[i :: len(nodes)]} for i in range(len(nodes))]
    told = [(node, kind.pop()) for (node, _), kind in zip(nodes, kinds, strict=True) if len(kind) == 1]
    return [Map(path, module, last, graph, node) for node, last in told if last is not None]

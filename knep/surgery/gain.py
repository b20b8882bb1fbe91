"""The gain that keeps a signal's mean square through what follows a layer, measured on a sample.

For a nonlinearity f it is 1 / sqrt(E f(z)^2), z standard normal: sqrt(2) for ReLU (He et al. 2015), 1 where none
follows, such as behind the classifier. What only scales or moves a signal, such as norms and pooling, is passed.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from knep.surgery.record import BENDS, BENDS_OR_GATES, Recorder, mode, name_of, ready

_PASSED = (
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "native_batch_norm", "native_layer_norm"}
    | {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
    | {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}
    | {"max_pool1d", "max_pool2d", "max_pool3d", "pad", "add", "add_", "__add__", "__radd__"}
    | {"__iadd__", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "contiguous", "squeeze"}
    | {"unsqueeze", "__getitem__", "chunk", "split", "cat", "concat", "clone", "to", "float", "roll", "mean"}
)


class _Watch(Recorder):
    """Which layers' outputs an activation reads first, and its gain; outputs are kept, so that no id comes again."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.carried: dict[int, set[nn.Module]] = {}
        self.kept: list[Any] = []
        self.gains: dict[nn.Module, float] = {}

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self._carry(output, {module})

    def _carry(self, output: Tensor, layers: set[nn.Module]) -> None:
        self.carried[id(output)] = layers
        self.kept.append(output)

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        read = [id(t) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        layers = {layer for i in read for layer in self.carried.get(i, ())}
        output = func(*args, **kwargs)
        name = name_of(func)
        if layers and name in (*BENDS, *BENDS_OR_GATES):
            for layer in layers:
                self.gains.setdefault(layer, gain_of(func, args[1:], kwargs))
        for t in pytree.tree_leaves(output):
            if isinstance(t, Tensor) and (name in _PASSED or id(t) in self.carried):
                self._carry(t, layers if name in _PASSED else set())
        return output


def gain_of(function: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> float:
    """1 / sqrt(E f(z)^2) of an elementwise function, z standard normal, by its quantiles."""
    z = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    if name_of(function) == "prelu":
        slope = args[0] if args else (kwargs or {})["weight"]
        values = nn.functional.leaky_relu(z, 0.25 if slope.is_meta else float(slope.mean()))
    else:
        values = function(z, *args, **{k: v for k, v in (kwargs or {}).items() if k != "inplace"})
    return 1 / math.sqrt(values.square().mean().item())


def gains_of(model: nn.Module, sample: Tensor, layers: list[nn.Module]) -> dict[nn.Module, float]:
    """The gain that each of the layers asks for when the model reads two images of the sample, unitless."""
    with torch.no_grad(), mode(model, False), _Watch(layers) as watch:
        model(ready(model, sample))
    return {layer: watch.gains.get(layer, 1.0) for layer in layers}

"""What kind of layer a module is: activations, gates, norms."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# What bends the signal between two layers.
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
)


# What does so, or gates another signal: an activation only where a module reads its output directly.
GATES = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid)


_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm: torch's, or a class that says so, such as LayerNorm2d or LlamaRMSNorm."""
    return isinstance(module, _NORMS) or (type(module).__name__.lower().rstrip("0123456789d").endswith("norm"))

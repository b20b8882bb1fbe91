"""What kind of layer a module is: activations, gates, norms, adapters."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

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


def is_adapter(module: nn.Module) -> bool:
    """Whether the module is a frozen linear layer or convolution with a low-rank correction that is trained beside it.

    Told by names, lora_A and the like, or by shapes: matrices (r, in) and (out, r) beside a frozen (out, in), r smaller
    than both (Hu et al. 2022, sec. 4.1). What stands around several layers is no adapter.
    """
    base = [m for m in (module, *module.children()) if isinstance(m, (nn.Linear, _ConvNd))]
    names = (*module._parameters, *module._modules)
    if all(p.requires_grad for p in module.parameters()):
        return False
    if any(name.lower().startswith("lora") for name in names) and (base or "base_layer" in names):
        return True
    frozen = [m.weight for m in base if not m.weight.requires_grad and m.weight.dim() == 2]
    if len(frozen) != 1:
        return False
    rows, columns = frozen[0].shape
    shapes = {tuple(sorted(p.shape)) for p in module.parameters() if p.requires_grad and p.dim() == 2}
    ranks = {smaller for smaller, larger in shapes if larger == columns and smaller < min(rows, columns)}
    return any((rank, rows) in shapes for rank in ranks)


def adapters(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each module inside an adapter -> that adapter, the outermost one."""
    found: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if module not in found and is_adapter(module):
            found |= {inside: module for inside in module.modules() if inside not in found}
    return found

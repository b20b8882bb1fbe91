"""What Fixup asks of a model, and the numbers that it adds before layers."""

from torch import nn
from torch.nn.modules.conv import _ConvNd

from knep.errors import InputError
from knep.nn.branch import Shift
from knep.nn.kinds import ACTIVATIONS, GATES, is_norm
from knep.surgery.edit import Change, modules_of
from knep.surgery.insert_module import put_before


def refuse_for_fixup(model: nn.Module) -> None:
    """Raises InputError, naming the module, for a model with norms or attention."""
    norm = next(((path, m) for path, m in modules_of(model, nn.Module) if is_norm(m)), None)
    if norm is not None:
        raise InputError(
            f"fixup is for nets without norms, and {norm[0]} is {type(norm[1]).__name__}: write init=skipinit, or "
            "norm=none for a model built without"
        )
    if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        raise InputError("fixup is for convolutions and linear layers, and the model has attention: write init=t_fixup")


def shifted(model: nn.Module) -> list[Change]:
    """A trained number before each convolution, linear layer and activation, each module once."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd, *ACTIVATIONS, *GATES))]
    like = next(model.parameters())
    put = [Shift().to(like) for _ in layers]
    for layer, shift in zip(layers, put, strict=True):
        put_before(layer, shift, "shift")
    paths = {id(m): path for path, m in model.named_modules()}
    return [Change(f"{paths[id(m)]}.bias", "none", "fixup, 0") for m in put]

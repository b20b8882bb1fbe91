"""`clip`: what is done to the gradients before the step. `f(parameters, **hp)` edits `.grad` in place.

Every option returns the global gradient norm before its edit, 0-dim, without waiting for the device. Parameters
without a gradient are skipped; without any the norm is 0. Hyper-parameters are checked even then.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from knep.optim.gradients import global_norm, gradients, scale_
from knep.utils.validation import check

__all__ = ["adaptive", "none", "norm", "normalize", "value"]


def none(parameters: Iterable[Tensor]) -> Tensor:
    """Leaves the gradients alone and measures their norm."""
    return global_norm(gradients(parameters))


def norm(parameters: Iterable[Tensor], *, theta: float = 1.0) -> Tensor:
    """Shortens the gradient to length theta where it is longer; its direction stays: g <- g min(1, theta / ||g||).

    Pascanu, Mikolov and Bengio 2013, algorithm 1. There is no epsilon in the division: a longer gradient ends at theta
    to rounding, a shorter one keeps every bit.

    theta: length, in (0, inf). Raises InputError outside it.
    """
    check("theta", theta, "(0, inf)")
    grads = gradients(parameters)
    total = global_norm(grads)
    scale_(grads, (theta / total).clamp(max=1.0))
    return total


def value(parameters: Iterable[Tensor], *, theta: float = 0.5) -> Tensor:
    """Limits each element of the gradient to [-theta, theta], which may turn its direction.

    theta: largest absolute value of an element, in (0, inf). Raises InputError outside it.
    """
    check("theta", theta, "(0, inf)")
    grads = gradients(parameters)
    total = global_norm(grads)
    if grads:
        torch._foreach_clamp_min_(grads, -theta)
        torch._foreach_clamp_max_(grads, theta)
    return total


def normalize(parameters: Iterable[Tensor], *, theta: float = 1.0) -> Tensor:
    """Gives the gradient the length theta always: g <- theta g / ||g||, so that only its direction is left.

    A zero gradient stays zero. With plain SGD this is normalized gradient descent (Hazan, Levy and Shalev-Shwartz
    2015).

    theta: length, in (0, inf). Raises InputError outside it.
    """
    check("theta", theta, "(0, inf)")
    grads = gradients(parameters)
    total = global_norm(grads)
    scale_(grads, torch.where(total > 0, theta / total, 1.0))
    return total


def adaptive(parameters: Iterable[Tensor], *, factor: float = 0.01, eps: float = 1e-3) -> Tensor:
    """Shortens the gradient of each unit to a share of the unit's weights: ||G_i|| <= factor max(||W_i||, eps).

    Adaptive gradient clipping, Brock et al. 2021, eq. 3. A unit is a row of a linear layer, a filter of a convolution
    (an input channel of a transposed one), or a whole vector. The paper leaves the classifier unclipped; from tensors
    alone it cannot be told apart, so it is clipped here as well.

    factor: unitless, in (0, inf); eps: least norm that weights count with, in (0, inf). Raises InputError outside.
    """
    check("factor", factor, "(0, inf)")
    check("eps", eps, "(0, inf)")
    owners = [p for p in parameters if p.grad is not None]
    total = global_norm(gradients(owners))
    for p in owners:
        if p.grad is not None:
            limit = factor * _unit_norm(p.detach()).clamp(min=eps)
            p.grad.mul_((limit / _unit_norm(p.grad)).clamp(max=1.0))
    return total


def _unit_norm(x: Tensor) -> Tensor:
    """Norm of each unit, shape (units, 1, ...), or () for a vector, in float32 at least."""
    dims = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=dims, keepdim=x.ndim > 1, dtype=wide)

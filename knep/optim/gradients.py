"""Gradients of many parameters seen as one vector."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one, in their order."""
    return [p.grad for p in parameters if p.grad is not None]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, 0-dim on their device, 0 for none of them; never waits for the device.

    Half-precision tensors are measured in float32: their squares would overflow at 256 (float16).
    """
    return torch.nn.utils.get_total_norm([t.float() if t.dtype in HALF else t for t in tensors])


def scale_(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply every tensor by `factor` (a 0-dim tensor, or a number) in place; exactly 1 leaves every bit."""
    if tensors:
        torch._foreach_mul_(list(tensors), factor)

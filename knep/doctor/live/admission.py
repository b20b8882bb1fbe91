"""What a watch is given by the user's loop, checked."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from knep.errors import InputError


def number(loss: Any) -> float:
    """The loss as a number, from a number or a tensor of one element. Raises InputError for anything else."""
    if isinstance(loss, Tensor):
        return float(scalar(loss)) if loss.numel() != 1 or loss.is_complex() else loss.item()
    if isinstance(loss, bool) or not isinstance(loss, (int, float)):
        raise InputError(f"step: the loss is {type(loss).__name__}: give a number or a tensor of one element")
    return float(loss)


def scalar(loss: Tensor) -> Tensor:
    """The loss, 0-dim, as it lies on its device. Raises InputError for any other shape."""
    if loss.numel() != 1 or loss.is_complex():
        raise InputError(f"step: the loss has shape {tuple(loss.shape)}: give one real number, such as loss.mean()")
    return loss.detach().reshape(())


def check(model: Any, optimizer: Any, every: Any, on_finding: Any) -> None:
    """Raises InputError for what cannot be watched."""
    if not isinstance(model, nn.Module):
        raise InputError(f"watch: the model is {type(model).__name__}: give a torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise InputError(f"watch: {type(model).__name__} has no parameters, so nothing in it can learn: give a model")
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"watch: the optimizer is {type(optimizer).__name__}: give a torch.optim.Optimizer")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise InputError(f"watch: every={every} must be a whole number of steps, at least 1")
    if on_finding not in ("warn", "none") and not callable(on_finding):
        raise InputError(f"watch: on_finding={on_finding} is unknown: write warn, none or a function")

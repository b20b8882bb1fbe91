"""What a recipe changed in a network, taken back where the fit is refused before its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Undo:
    """The layers, attributes and values that a network has now; `back` gives it these again."""

    def __init__(self, net: nn.Module) -> None:
        self._kinds = {m: type(m) for m in net.modules()}
        self._attributes: dict[nn.Module, dict[str, Any]] = {m: _copied(vars(m)) for m in net.modules()}
        self._flags = {p: p.requires_grad for p in net.parameters()}
        self._values: list[tuple[Tensor, Tensor]] = [
            (tensor, tensor.detach().clone()) for tensor in (*net.parameters(), *net.buffers())
        ]

    @torch.no_grad()
    def back(self) -> None:
        for module, kind in self._kinds.items():
            module.__class__ = kind
        for module, attributes in self._attributes.items():
            vars(module).clear()
            vars(module).update(attributes)
        for p, flag in self._flags.items():
            p.requires_grad_(flag)
        for tensor, value in self._values:
            if tensor.shape == value.shape:
                tensor.copy_(value)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """With dicts of their own: the modules, parameters, buffers and hooks of a module stand in such."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in attributes.items()}

"""How large the tensors are that a constructor makes: found from what it asks torch for, before torch takes memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from knep.errors import InputError

_BYTES = 4  # of a number, where an operation does not say
# Operations whose plain numbers are lengths.
_LENGTHS = ("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "hann_window", "hamming_window")


class Counted(TorchDispatchMode):
    """Raises InputError where operations would make more than so many bytes together, or are more than so many."""

    def __init__(self, most_bytes: int, most_steps: int) -> None:
        super().__init__()
        self._most, self._bytes, self._steps = most_bytes, most_bytes, most_steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._steps -= 1
        self._bytes -= _asked(func, args, kwargs)
        if self._bytes < 0:
            raise InputError(
                f"it makes tensors of more than {self._most / 1e6:,.0f} MB: write smaller numbers, or lift the limit "
                f"with budget.megabytes={4 * self._most / 1e6:.0f}"
            )
        if self._steps < 0:
            raise InputError("it takes too many steps to build: write smaller numbers")
        return func(*args, **kwargs)


def _asked(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes of the new tensor that an operation is asked for; 0 for one that changes or looks at what is there."""
    name = func.overloadpacket.__name__
    given = [a for a in (*args, *kwargs.values()) if not isinstance(a, bool)]
    dtype = kwargs.get("dtype")
    item = dtype.itemsize if isinstance(dtype, torch.dtype) else _BYTES
    if name in ("clone", "_to_copy", "cat", "stack"):
        tensors = [t for a in given for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)
    if name in _LENGTHS:
        return item * math.ceil(max((abs(a) for a in given if isinstance(a, int | float)), default=0))
    if isinstance(given[0] if given else None, Tensor) and not name.startswith(("new_", "repeat")):
        return 0
    sizes = [math.prod(a) for a in given if isinstance(a, list | tuple) and all(isinstance(n, int) for n in a)]
    return item * max(sizes, default=0) if not func.is_view else 0

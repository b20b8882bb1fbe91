"""What an optimizer does with numbers that are not finite, and those in its state."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.guard.finite import finite, first_bad

# Their equations carry a gradient that is not finite into its weight in the same step, at any learning rate: the
# gradient alone makes g, g / |g| or m / sqrt(v) infinite or NaN. Rules of signs and of norms do not.
_CARRY = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)
# Steps between looks at the state. An infinite second moment makes updates of zero, which no weight shows.
LOOK_EVERY = 50


def carries(optimizer: Optimizer) -> bool:
    """Whether a gradient that is not finite makes its weight so in the very step, and is itself left as it is."""
    return type(optimizer) in _CARRY and not any(group.get("nesterov") for group in optimizer.param_groups)


def named_state(module: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of an optimizer's state by kind and parameter; of SAM its base's."""
    states = getattr(optimizer, "base_optimizer", optimizer).state
    for name, p in module.named_parameters():
        for kind, value in (states.get(p) or {}).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield f"{kind} of {name}", value


def state_is_finite(module: nn.Module, optimizer: Optimizer) -> bool:
    """Whether all that an optimizer keeps for its next steps is finite; waits for the device."""
    tensors = [t for _, t in named_state(module, optimizer)]
    devices = {t.device for t in tensors}
    return all(finite([t for t in tensors if t.device == device]) for device in devices)


def forget_bad_state(optimizer: Optimizer) -> None:
    """Lets the parameters whose state is not finite, and would make every step bad, start anew."""
    states = getattr(optimizer, "base_optimizer", optimizer).state
    for p, state in list(states.items()):
        if first_bad((k, v) for k, v in state.items() if isinstance(v, Tensor)):
            del states[p]

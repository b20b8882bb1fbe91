"""Layouts in which images may have been given by mistake, with what undoes each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "inverted (dark for bright)": lambda x: -x,
    "with the channels in reverse order (BGR for RGB)": lambda x: x.flip(1),
    "transposed": lambda x: x.transpose(2, 3),
    "upside down": lambda x: x.flip(2),
    "mirrored": lambda x: x.flip(3),
    "turned by 180 degrees": lambda x: x.flip(2, 3),
    "turned by 90 degrees to the left": lambda x: x.rot90(-1, (2, 3)),
    "turned by 90 degrees to the right": lambda x: x.rot90(1, (2, 3)),
}


def undone(x: Tensor) -> dict[str, Tensor]:
    """Images (N, C, H, W) of mean 0 taken back from each layout that would show in them: name -> (N, C, H, W)."""
    taken = {name: undo(x) for name, undo in LAYOUTS.items()}
    return {name: y for name, y in taken.items() if y.shape == x.shape and not torch.equal(y, x)}

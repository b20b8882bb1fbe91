"""Colours changed at random."""

from __future__ import annotations

import torch
from torch import Tensor

from knep.recipes.augment.base import Stage, probability, refuse_other_pixels
from knep.recipes.augment.operations import Drawn, in_turn, index_of

__all__ = ["ColorJitter"]


class ColorJitter(Stage):
    """Brightness, contrast, saturation and hue of each image by factors of its own, in an order of its own.

    As torchvision's `ColorJitter` (after Howard 2013): the first three are U[max(0, 1 - v), 1 + v] of the image's, the
    hue is turned by U[-hue, hue] of its circle. Masks stay as they are.

    brightness, contrast, saturation: v, in [0, inf), 0 for never; hue: in [0, 0.5]; p: share of images that are
    changed; off_epoch: as for `Stage`. Raises ValueError outside, InputError for other images than raw grey or RGB.
    """

    def __init__(
        self,
        *,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.0,
        p: float = 1.0,
        off_epoch: int | None = None,
    ) -> None:
        super().__init__(off_epoch=off_epoch)
        if min(brightness, contrast, saturation) < 0:
            raise ValueError(
                f"brightness, contrast and saturation must be at least 0, got {brightness}, {contrast} and {saturation}"
            )
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {hue}")
        self._p = probability("p", p)
        wide = {"brightness": brightness, "contrast": contrast, "color": saturation, "hue": hue}
        self._names = [name for name, v in wide.items() if v]
        bounds = [(-v, v) if name == "hue" else (max(0, 1 - v), 1 + v) for name, v in wide.items() if v]
        self._low, self._high = torch.tensor(bounds).T if bounds else (torch.zeros(0), torch.zeros(0))

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other_pixels("color_jitter", x)
        return in_turn(x, y, self.drawn(len(x), x.device), 0.0, moves=False)

    def drawn(self, n: int, device: torch.device) -> list[Drawn]:
        """The operations of each of n images, in their order."""
        count = len(self._names)
        u = torch.rand(2 * count + 1, n, device=device).cpu()
        order = u[:count].argsort(0)
        factor = (self._low[:, None] + (self._high - self._low)[:, None] * u[count:-1]).gather(0, order)
        which = index_of(self._names)[order] if count else order
        which = torch.where(u[-1] < self._p, which, -1)
        return [Drawn(w, f) for w, f in zip(which, factor, strict=True)]

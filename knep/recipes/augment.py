"""`augment`: label-preserving noise on training batches. `nn.Module(x, y, num_classes) -> (x, y)`, on the device.

x: raw pixels (N, C, H, W), uint8 or float in 0..255, before scaling, so that what is filled in is black; y: int64 (N,).
Mixing options return probabilities (N, num_classes) for y. In eval mode all are the identity. Randomness comes from
torch's generator of x's device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Cutmix", "Erase", "Flip", "Mixup", "Shift", "ShiftFlip", "Trivial", "none"]


class _Identity(nn.Module):
    def forward(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        return x, y


def none() -> nn.Module:
    """Batches as they are."""
    return _Identity()


class _Training(nn.Module):
    """Acts in training mode only; subclasses say how, in `change`. epoch: set by whoever trains, before each epoch."""

    epoch = 0

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        return self.change(x, y, num_classes) if self.training else (x, y)


def _probability(name: str, p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {p}")
    return p


class Shift(_Training):
    """Moves each image by its own random offset in [-pixels, pixels] along both axes; what enters is black.

    The shift half of "pad and crop" (Lee et al. 2015; He et al. 2015, sec. 4.2).

    pixels: at least 1. Raises ValueError below.
    """

    def __init__(self, *, pixels: int = 2) -> None:
        super().__init__()
        if pixels < 1:
            raise ValueError(f"pixels must be at least 1, got {pixels}")
        self._pixels = pixels

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        n, _, height, width = x.shape
        p = self._pixels
        offsets = torch.randint(0, 2 * p + 1, (2, n, 1), device=x.device)
        rows = offsets[0] + torch.arange(height, device=x.device)
        columns = offsets[1] + torch.arange(width, device=x.device)
        padded = F.pad(x, (p, p, p, p)).permute(0, 2, 3, 1)
        image = torch.arange(n, device=x.device)[:, None, None]
        return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2), y


class Flip(_Training):
    """Mirrors each image left to right with probability p.

    With `alternate` an image is mirrored in every other epoch, half of them in the odd ones, so that both views of each
    are seen in any two epochs (Jordan 2024, sec. 3.6). Which half is read off the image: whether the sum of its pixels,
    as whole numbers, is odd.

    p: in [0, 1]; 0.5 with alternate. Raises ValueError outside.
    """

    def __init__(self, *, p: float = 0.5, alternate: bool = False) -> None:
        super().__init__()
        self._p, self._alternate = _probability("p", p), alternate
        if alternate and p != 0.5:
            raise ValueError(f"p must be 0.5 where flips alternate, got {p}")

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        if self._alternate:
            mirrored = (x.long().sum((1, 2, 3), keepdim=True) + self.epoch) % 2 == 0
        else:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < self._p
        return torch.where(mirrored, x.flip(3), x), y


class ShiftFlip(_Training):
    """`Flip`, then `Shift`: the standard for small images (He et al. 2015, sec. 4.2).

    pixels: as for `Shift`; p, alternate: as for `Flip`.
    """

    def __init__(self, *, pixels: int = 2, p: float = 0.5, alternate: bool = False) -> None:
        super().__init__()
        self._shift, self._flip = Shift(pixels=pixels), Flip(p=p, alternate=alternate)

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        self._flip.epoch = self.epoch
        return self._shift.change(*self._flip.change(x, y, num_classes), num_classes)


class Erase(_Training):
    """Blackens a random rectangle of each image with probability p (Zhong et al. 2017, algorithm 1, black fill).

    The rectangle's area is U(smallest, largest) of the image's, its aspect ratio log-uniform in [0.3, 1 / 0.3].

    p: in [0, 1]; smallest, largest: shares of the area, 0 < smallest <= largest < 1. Raises ValueError outside.
    """

    def __init__(self, *, p: float = 0.25, smallest: float = 0.02, largest: float = 0.33) -> None:
        super().__init__()
        if not 0 < smallest <= largest < 1:
            raise ValueError(f"smallest and largest must be 0 < smallest <= largest < 1, got {smallest} and {largest}")
        self._p, self._smallest, self._largest = _probability("p", p), smallest, largest

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        n, _, height, width = x.shape
        u = torch.rand(5, n, device=x.device)
        area = (self._smallest + (self._largest - self._smallest) * u[0]) * height * width
        aspect = torch.exp((2 * u[1] - 1) * -torch.log(torch.tensor(0.3, device=x.device)))
        h = (area * aspect).sqrt().round().clamp(1, height)
        w = (area / aspect).sqrt().round().clamp(1, width)
        box = _box(x, (u[2] * (height - h + 1)).floor(), (u[3] * (width - w + 1)).floor(), h, w)
        return x.masked_fill(box & (u[4] < self._p)[:, None, None, None], 0), y


def _box(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Mask (N, 1, H, W) of a rectangle per image, its edges given as (N,)."""
    rows = torch.arange(x.shape[2], device=x.device)
    columns = torch.arange(x.shape[3], device=x.device)
    down = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    across = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    return (down[:, :, None] & across[:, None, :])[:, None]


def _mixed_labels(y: Tensor, partner: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """share of each image's own class and the rest of its partner's; share: (N,) or ()."""
    own, other = F.one_hot(y, num_classes).float(), F.one_hot(y[partner], num_classes).float()
    weight = share.reshape(-1, 1)
    return own * weight + other * (1 - weight)


def _beta(alpha: float, count: int, device: torch.device) -> Tensor:
    """Draws (count,) from Beta(alpha, alpha), by two gamma draws on the device."""
    gamma = torch._standard_gamma(torch.full((2, count), alpha, device=device))
    return gamma[0] / gamma.sum(0)


class _Mixing(_Training):
    def __init__(self, *, alpha: float = 1.0) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        self._alpha = alpha


class Mixup(_Mixing):
    """Blends each image, and its label, with another of the batch: l x + (1 - l) x', l ~ Beta(alpha, alpha).

    Zhang et al. 2018, eq. 1, with a draw of its own for each image.

    alpha: in (0, inf), unitless; small values blend little. Raises ValueError outside.
    """

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        share = _beta(self._alpha, len(x), x.device)
        partner = torch.randperm(len(x), device=x.device)
        weight = share[:, None, None, None]
        return x * weight + x[partner] * (1 - weight), _mixed_labels(y, partner, share, num_classes)


class Cutmix(_Mixing):
    """Pastes a rectangle of another image of the batch, and mixes labels by the area left (Yun et al. 2019, eq. 1).

    The rectangle covers 1 - l of the image, l ~ Beta(alpha, alpha); labels go by the pixels it really covers.

    alpha: in (0, inf), unitless. Raises ValueError outside.
    """

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        n, _, height, width = x.shape
        side = (1 - _beta(self._alpha, n, x.device)).sqrt()
        h, w = (side * height).round(), (side * width).round()
        u = torch.rand(2, n, device=x.device)
        box = _box(x, (u[0] * (height - h + 1)).floor(), (u[1] * (width - w + 1)).floor(), h, w)
        partner = torch.randperm(n, device=x.device)
        share = 1 - h * w / (height * width)
        return torch.where(box, x[partner], x), _mixed_labels(y, partner, share, num_classes)


class Trivial(_Training):
    """One random operation of random strength per group of images (TrivialAugment, Mueller and Hutter 2021).

    The paper draws for each image; here the batch is cut into `groups` random parts with a draw each, which is what
    makes whole-batch operations possible. Works on uint8.

    groups: draws per batch, at least 1. Raises ValueError below, and for images that are not uint8.
    """

    def __init__(self, *, groups: int = 8) -> None:
        super().__init__()
        from torchvision.transforms.v2 import TrivialAugmentWide

        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self._groups, self._transform = groups, TrivialAugmentWide()

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.uint8:
            raise ValueError(f"trivial needs uint8 images, got {x.dtype}: use it on raw pixels, before scaling")
        out = x.clone()
        for part in torch.randperm(len(x), device=x.device).chunk(self._groups):
            out[part] = self._transform(x[part])
        return out, y

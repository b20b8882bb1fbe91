"""Images of a batch mixed with others, and their labels with them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.errors import InputError
from knep.recipes.augment.base import Stage, probability, refuse_picture
from knep.recipes.augment.erase import box

__all__ = ["Cutmix", "Mixup", "MixupCutmix"]


def _mixed_labels(y: Tensor, partner: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """share of each image's own class and the rest of its partner's; share: (N,) or (). Floats (N, ...) are blended."""
    if y.is_floating_point():
        weight = share.reshape(-1, *[1] * (y.dim() - 1)).to(y.dtype)
        return y * weight + y[partner] * (1 - weight)
    own, other = F.one_hot(y, num_classes).float(), F.one_hot(y[partner], num_classes).float()
    weight = share.reshape(-1, 1)
    return own * weight + other * (1 - weight)


def _beta(alpha: float, count: int, device: torch.device) -> Tensor:
    """Draws (count,) from Beta(alpha, alpha), by two gamma draws on the device."""
    gamma = torch._standard_gamma(torch.full((2, count), alpha, device=device))
    return gamma[0] / gamma.sum(0)


class _Mixing(Stage):
    mixes = True

    def __init__(self, *, alpha: float = 1.0, off_epoch: int | None = None) -> None:
        super().__init__(off_epoch=off_epoch)
        if alpha <= 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        self._alpha = alpha


class Mixup(_Mixing):
    """Blends each image, and its label, with another of the batch: l x + (1 - l) x', l ~ Beta(alpha, alpha).

    Zhang et al. 2018, eq. 1, with a draw of its own for each image. x may be any (N, ...), and so may a float y.

    alpha: in (0, inf), unitless; small values blend little; off_epoch: as for `Stage`. Raises ValueError outside,
    InputError for tokens.
    """

    def __init__(self, *, alpha: float = 1.0, off_epoch: int | None = None) -> None:
        super().__init__(alpha=alpha, off_epoch=off_epoch)

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        _refuse_unmixable("mixup", x, y)
        share = _beta(self._alpha, len(x), x.device)
        partner = torch.randperm(len(x), device=x.device)
        weight = share.reshape(-1, *[1] * (x.dim() - 1))
        return x * weight + x[partner] * (1 - weight), _mixed_labels(y, partner, share, num_classes)


def _refuse_unmixable(name: str, x: Tensor, y: Tensor) -> None:
    if x.dtype in (torch.int32, torch.int64):
        raise InputError(f"augment={name} mixes values, and the input {tuple(x.shape)} is tokens: write augment=none")
    if not isinstance(y, Tensor) or (y.dim() != 1 and not y.is_floating_point()):
        refuse_picture(name, y, "augment=none")
        raise InputError(
            f"augment={name} mixes one class a row, and the target is {tuple(y.shape)}: write augment=none"
        )


class Cutmix(_Mixing):
    """Pastes a rectangle of another image of the batch, and mixes labels by the area left (Yun et al. 2019, eq. 1).

    The rectangle covers 1 - l of the image, l ~ Beta(alpha, alpha); labels go by the pixels it really covers. It is a
    stretch of signals (N, C, L), a box of volumes (N, C, D, H, W).

    alpha: in (0, inf), unitless; off_epoch: as for `Stage`. Raises ValueError outside, InputError for tokens, and for
    rows without a place.
    """

    def __init__(self, *, alpha: float = 1.0, off_epoch: int | None = None) -> None:
        super().__init__(alpha=alpha, off_epoch=off_epoch)

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        _refuse_unmixable("cutmix", x, y)
        refuse_picture("cutmix", y, "augment=none")
        if x.dim() < 3:
            raise InputError(f"augment=cutmix pastes a part of an image, got {tuple(x.shape)}: write augment=mixup")
        n, _, *sizes = x.shape
        area = 1 - _beta(self._alpha, n, x.device)
        side = area.sqrt() if len(sizes) == 2 else area ** (1 / len(sizes))
        sides = [(side * size).round() for size in sizes]
        u = torch.rand(len(sizes), n, device=x.device)
        starts = [(u[i] * (size - s + 1)).floor() for i, (size, s) in enumerate(zip(sizes, sides, strict=True))]
        pasted = box(x, starts, sides)
        partner = torch.randperm(n, device=x.device)
        share = 1 - torch.stack(sides).prod(0) / math.prod(sizes)
        return torch.where(pasted, x[partner], x), _mixed_labels(y, partner, share, num_classes)


class Draw(NamedTuple):
    """How each image is mixed. share: of its own, 1 for an image that is left alone; cuts: whether by a rectangle;
    rows, columns: its middle, in pixels. All (N,)."""

    share: Tensor
    cuts: Tensor
    rows: Tensor
    columns: Tensor


class MixupCutmix(Stage):
    """Mixup or CutMix, the image's partner being its mirror in the order of the batch, with timm's parameters.

    With probability prob images are mixed: by CutMix with probability switch_prob where both alphas are above 0, l ~
    Beta(alpha, alpha) of the one that is chosen (Zhang et al. 2018; Yun et al. 2019; chosen between as in Touvron et
    al. 2021, sec. 6). Mode "batch" draws once, "elem" for each image, "pair" once for an image and its partner. A
    rectangle's middle lies anywhere in the image, so that it may be cut off at the border; labels go by the pixels that
    are left. Labels become (1 - s) q + s / K, s = smoothing, mixed or not; targets of several labels (N, K) become
    (1 - s) q + s / 2. From off_epoch on they are smoothed alone, as in timm. In a batch of an odd number the image in
    the middle is its own partner.

    mixup_alpha, cutmix_alpha: in [0, inf), 0 for never; prob, switch_prob: in [0, 1]; mode: as above; smoothing: in
    [0, 1); off_epoch: as for `Stage`. Raises ValueError outside, InputError for what has no classes to mix.
    """

    mixes = True

    def __init__(
        self,
        *,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        smoothing: float = 0.0,
        off_epoch: int | None = None,
    ) -> None:
        super().__init__(off_epoch=off_epoch)
        if min(mixup_alpha, cutmix_alpha) < 0 or mixup_alpha + cutmix_alpha == 0:
            raise ValueError(f"mixup_alpha and cutmix_alpha must be positive, or one of them 0, got {mixup_alpha} and "
                             f"{cutmix_alpha}")  # fmt: skip
        if mode not in ("batch", "elem", "pair"):
            raise ValueError(f"mode must be batch, elem or pair, got {mode}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self._alphas, self._mode, self._smoothing = (mixup_alpha, cutmix_alpha), mode, smoothing
        self._prob, self._switch = probability("prob", prob), probability("switch_prob", switch_prob)

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        _refuse_unmixable("mixup_cutmix", x, y)
        refuse_picture("mixup_cutmix", y, "augment=none")
        if x.dim() != 4 and self._alphas[1]:
            raise InputError(
                f"augment=mixup_cutmix pastes a part of an image, got {tuple(x.shape)}: write "
                "augment=mixup_cutmix augment.cutmix_alpha=0"
            )
        return self.mixed(x, y, self.draw(x), num_classes)

    def ended(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        return x, _smoothed(y, num_classes, self._smoothing) if self._smoothing else y

    def draw(self, x: Tensor) -> Draw:
        """As timm's `Mixup` draws for a batch like x."""
        n, device = len(x), x.device
        count = {"batch": 1, "elem": n, "pair": (n + 1) // 2}[self._mode]
        u = torch.rand(4, count, device=device)
        mixup, cutmix = self._alphas
        cuts = u[0] < self._switch if mixup and cutmix else torch.full_like(u[0], bool(cutmix), dtype=torch.bool)
        shares = [_beta(alpha or 1.0, count, device) for alpha in self._alphas]
        share = torch.where(u[1] < self._prob, torch.where(cuts, shares[1], shares[0]), 1.0)
        height, width = x.shape[-2:] if x.dim() == 4 else (1, 1)
        drawn = Draw(share, cuts, (u[2] * height).floor(), (u[3] * width).floor())
        if self._mode == "pair":  # an image and its partner by the same draw
            return Draw(*(torch.cat([v, v[: n // 2].flip(0)]) for v in drawn))
        return Draw(*(v.expand(n) for v in drawn))

    def mixed(self, x: Tensor, y: Tensor, drawn: Draw, num_classes: int) -> tuple[Tensor, Tensor]:
        """The batch by a draw."""
        other, share = x.flip(0), drawn.share
        looks = x.device.type == "cpu"  # elsewhere a look at the draw waits for the device
        blends, cuts = not (looks and drawn.cuts.all()), self._alphas[1] and not (looks and not drawn.cuts.any())
        out = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        if blends:
            blend = torch.where(drawn.cuts, 1.0, share).reshape(-1, *[1] * (x.dim() - 1))
            out = torch.lerp(other.to(out.dtype), out, blend.to(out.dtype))
        if cuts:
            starts, sides = cutmix_box(share, drawn.rows, drawn.columns, *x.shape[-2:])
            out = torch.where(box(x, starts, sides) & drawn.cuts[:, None, None, None], other.to(out.dtype), out)
            left = 1 - sides[0] * sides[1] / (x.shape[-2] * x.shape[-1])
            share = torch.where(drawn.cuts, left, share)
        q = _smoothed(y, num_classes, self._smoothing)
        weight = share.reshape(-1, *[1] * (q.dim() - 1)).to(q.dtype)
        return out, q * weight + q.flip(0) * (1 - weight)


def cutmix_box(
    share: Tensor, row: Tensor, column: Tensor, height: int, width: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Starts and sides of rectangles around (row, column) that cover 1 - share, cut off at the border, as timm has it.

    share, row, column: (N,), and so are the results.
    """
    starts, sides = [], []
    for middle, length in ((row, height), (column, width)):
        cut = ((1 - share).sqrt() * length).floor()
        start = (middle - (cut / 2).floor()).clamp(0, length)
        starts.append(start)
        sides.append((middle + ((cut + 1) / 2).floor()).clamp(0, length) - start)
    return (starts[0], starts[1]), (sides[0], sides[1])


def _smoothed(y: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Probabilities of classes int64 (N,), or of targets that are floats already."""
    if y.is_floating_point():
        return y * (1 - smoothing) + smoothing / 2 if smoothing else y
    return F.one_hot(y, num_classes).float() * (1 - smoothing) + smoothing / num_classes

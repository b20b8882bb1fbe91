"""Policies: which operations an image undergoes, and how strongly. Each image of a batch has draws of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from knep.errors import InputError
from knep.recipes.augment.base import (
    Stage,
    is_picture,
    probability,
    refuse_other,
    refuse_other_pixels,
    refuse_picture,
)
from knep.recipes.augment.operations import Drawn, Fill, in_turn, index_of

__all__ = ["AugMix", "AutoAugment", "RandAugment", "ThreeAugment", "Trivial"]

GREY = 128.0  # what timm fills in where it knows no mean colour
Level = Callable[[Tensor, Tensor], Tensor]  # (share of the full strength, sign) -> strength in the operation's unit
_UNIFORM = 100  # a deviation above which timm draws magnitudes evenly


def _none(v: Tensor, sign: Tensor) -> Tensor:
    return torch.zeros_like(v)


def _enhanced(v: Tensor, sign: Tensor) -> Tensor:
    return v * 1.8 + 0.1


def _enhanced_more(v: Tensor, sign: Tensor) -> Tensor:
    return (1 + sign * v * 0.9).clamp_min(0.1)


def _whole(v: Tensor) -> Tensor:
    return (v + 1e-6).floor()  # a tenth is less than one in float32


def rand_augment_levels(increasing: bool, translate: float = 0.45) -> dict[str, Level]:
    """Operation -> its strength by magnitude / 10, as timm's RandAugment has both of its scales.

    translate: share of a side at full strength.
    """
    enhanced = _enhanced_more if increasing else _enhanced

    def posterize(v: Tensor, sign: Tensor) -> Tensor:
        return 4 - _whole(v * 4) if increasing else _whole(v * 4)

    def solarize(v: Tensor, sign: Tensor) -> Tensor:
        threshold = _whole(v * 256).clamp_max(256)
        return 256 - threshold if increasing else threshold

    return {
        "auto_contrast": _none,
        "equalize": _none,
        "invert": _none,
        "rotate": lambda v, sign: sign * v * 30,
        "posterize": posterize,
        "solarize": solarize,
        "solarize_add": lambda v, sign: _whole(v * 110).clamp_max(128),
        "color": enhanced,
        "contrast": enhanced,
        "brightness": enhanced,
        "sharpness": enhanced,
        "shear_x": lambda v, sign: sign * v * 0.3,
        "shear_y": lambda v, sign: sign * v * 0.3,
        "translate_x": lambda v, sign: sign * v * translate,
        "translate_y": lambda v, sign: sign * v * translate,
    }


def _magnitudes(magnitude: float, mstd: float, u: Tensor, normal: Tensor) -> Tensor:
    """Shares of the full strength, as timm draws them: N(magnitude, mstd) in [0, 10], or U(0, magnitude)."""
    drawn = u * magnitude if mstd > _UNIFORM else magnitude + mstd * normal
    return drawn.clamp(0, 10) / 10


def _strengths(levels: dict[str, Level], choice: Tensor, v: Tensor, sign: Tensor) -> Tensor:
    """Of the operations chosen, (N,)."""
    each = torch.stack([level(v, sign) for level in levels.values()])
    return each.gather(0, choice[None])[0]


def _signs(u: Tensor) -> Tensor:
    return torch.where(u > 0.5, -1.0, 1.0)


def _check_magnitude(magnitude: float, mstd: float) -> None:
    if not 0 <= magnitude <= 10:
        raise ValueError(f"magnitude must be in [0, 10], got {magnitude}")
    if mstd < 0:
        raise ValueError(f"mstd must be at least 0, got {mstd}")


class RandAugment(Stage):
    """n operations in a row for each image, drawn from 15, each done with probability p (Cubuk et al. 2020).

    By timm's semantics, `rand-m{magnitude}-n{n}-mstd{mstd}-inc{increasing}-p{p}`: strengths N(magnitude, mstd) on a
    scale to 10, and timm's operations and units, where the paper and torchvision have one strength, on a scale to 30.
    Images are moved with bilinear interpolation, where timm draws bilinear or bicubic. Masks move along.

    n: at least 1; magnitude: in [0, 10]; mstd: at least 0, above 100 for U(0, magnitude); increasing: whether a higher
    magnitude changes more in every operation; p: in [0, 1]; fill: what enters, a grey or three numbers, in 0..255;
    off_epoch: as for `Stage`. Raises ValueError outside, InputError for other images than raw grey or RGB.
    """

    def __init__(
        self,
        *,
        n: int = 2,
        magnitude: float = 9.0,
        mstd: float = 0.5,
        increasing: bool = True,
        p: float = 0.5,
        fill: Fill = GREY,
        off_epoch: int | None = None,
    ) -> None:
        super().__init__(off_epoch=off_epoch)
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        _check_magnitude(magnitude, mstd)
        self._n, self._magnitude, self._mstd, self._p = n, magnitude, mstd, probability("p", p)
        self._levels, self._fill = rand_augment_levels(increasing), fill
        self._index = index_of(list(self._levels))

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other_pixels("rand_augment", x)
        moves = is_picture("rand_augment", x, y)
        return in_turn(x, y, self.drawn(len(x), x.device), _fill(self._fill, x), moves)

    def drawn(self, n: int, device: torch.device) -> list[Drawn]:
        """The operations of each of n images, in their order."""
        u = torch.cat([torch.rand(4, self._n, n, device=device), torch.randn(1, self._n, n, device=device)]).cpu()
        steps = []
        for step in range(self._n):
            chosen, done, sign, even, normal = u[:, step]
            choice = (chosen * len(self._levels)).long()
            v = _magnitudes(self._magnitude, self._mstd, even, normal)
            which = torch.where(done < self._p, self._index[choice], -1)
            steps.append(Drawn(which, _strengths(self._levels, choice, v, _signs(sign))))
        return steps


def _fill(fill: Fill, x: Tensor) -> Fill:
    """A colour for images of as many channels."""
    if isinstance(fill, (int, float)) or len(fill) in (1, x.shape[1]):
        return fill
    if len(fill) == 3:  # of grey images its brightness
        return 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    raise InputError(f"fill={list(fill)} is no colour: write one number or three")


def auto_augment_levels() -> dict[str, Level]:
    """Operation -> its strength by magnitude / 9, as torchvision's AutoAugment has them."""

    def turned(v: Tensor, sign: Tensor) -> Tensor:
        return 1 + sign * v * 0.9

    return {
        "auto_contrast": _none,
        "equalize": _none,
        "invert": _none,
        "rotate": lambda v, sign: sign * v * 30,
        "posterize": lambda v, sign: 8 - (v * 4).round(),
        "solarize": lambda v, sign: 255 * (1 - v),
        "color": turned,
        "contrast": turned,
        "brightness": turned,
        "sharpness": turned,
        "shear_x": lambda v, sign: sign * v * 0.3,
        "shear_y": lambda v, sign: sign * v * 0.3,
        "translate_x": lambda v, sign: sign * v * 150 / 331,
        "translate_y": lambda v, sign: sign * v * 150 / 331,
    }


_POLICIES = ("imagenet", "cifar10", "svhn")
_TORCHVISION = {
    "AutoContrast": "auto_contrast",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
}


class AutoAugment(Stage):
    """Two operations in a row for each image, by one of the 25 pairs that were searched for a data set.

    Cubuk et al. 2019; the tables, and the strengths behind them, are torchvision's. Images are moved with bilinear
    interpolation, where torchvision takes the nearest pixel. Masks move along.

    policy: imagenet, cifar10 or svhn; p: share of images that are changed; fill: as for `RandAugment`; off_epoch: as
    for `Stage`. Raises ValueError for others, InputError for other images than raw grey or RGB.
    """

    def __init__(
        self, *, policy: str = "imagenet", p: float = 1.0, fill: Fill = GREY, off_epoch: int | None = None
    ) -> None:
        super().__init__(off_epoch=off_epoch)
        if policy not in _POLICIES:
            raise ValueError(f"policy must be one of {', '.join(_POLICIES)}, got {policy}")
        from torchvision.transforms.autoaugment import AutoAugment as OfTorchvision
        from torchvision.transforms.autoaugment import AutoAugmentPolicy

        self._levels, self._p, self._fill = auto_augment_levels(), probability("p", p), fill
        self._index = index_of(list(self._levels))
        names = list(self._levels)
        pairs = OfTorchvision(AutoAugmentPolicy(policy)).policies
        rows = [[(names.index(_TORCHVISION.get(o, o.lower())), p, m or 0) for o, p, m in pair] for pair in pairs]
        self._choice, self._probability, self._magnitude = torch.tensor(rows, dtype=torch.float32).unbind(-1)

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other_pixels("auto_augment", x)
        moves = is_picture("auto_augment", x, y)
        return in_turn(x, y, self.drawn(len(x), x.device), _fill(self._fill, x), moves)

    def drawn(self, n: int, device: torch.device) -> list[Drawn]:
        """The operations of each of n images, in their order."""
        u = torch.rand(6, n, device=device).cpu()
        pair = (u[0] * len(self._choice)).long()
        steps = []
        for step, done, sign in ((0, u[2], u[3]), (1, u[4], u[5])):
            choice = self._choice[pair, step].long()
            which = torch.where((done < self._probability[pair, step]) & (u[1] < self._p), self._index[choice], -1)
            v = self._magnitude[pair, step] / 9
            steps.append(Drawn(which, _strengths(self._levels, choice, v, _signs(sign))))
        return steps


class AugMix(Stage):
    """A blend of each image with a mixture of `width` chains of operations on it (Hendrycks et al. 2020, algorithm 1).

    (1 - m) x + m sum_i w_i chain_i(x), w ~ Dirichlet(alpha), m ~ Beta(alpha, alpha). Operations and strengths are
    timm's, `augmix-m{magnitude}-w{width}-d{depth}`: those of RandAugment without invert and solarize_add, shifts to 0.3
    of a side. The paper's loss over three views (Jensen-Shannon) is no part of it.

    magnitude: in [0, 10]; width: chains, at least 1; depth: operations in each, U{1, 2, 3} below 1; alpha: in (0, inf);
    mstd: at least 0, above 100 for U(0, magnitude); p: share of images that are changed; fill: as for `RandAugment`;
    off_epoch: as for `Stage`. Raises ValueError outside, InputError for masks and for images that are not raw grey or
    RGB.
    """

    def __init__(
        self,
        *,
        magnitude: float = 3.0,
        width: int = 3,
        depth: int = -1,
        alpha: float = 1.0,
        mstd: float = 101.0,
        p: float = 1.0,
        fill: Fill = GREY,
        off_epoch: int | None = None,
    ) -> None:
        super().__init__(off_epoch=off_epoch)
        _check_magnitude(magnitude, mstd)
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if alpha <= 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        self._magnitude, self._mstd, self._p, self._fill = magnitude, mstd, probability("p", p), fill
        self._width, self._depth, self._alpha = width, depth, alpha
        levels = rand_augment_levels(increasing=True, translate=0.3)
        self._levels = {name: level for name, level in levels.items() if name not in ("invert", "solarize_add")}
        self._index = index_of(list(self._levels))

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other_pixels("aug_mix", x)
        refuse_picture("aug_mix", y, "augment=none")
        mixture, m = self.weights(len(x), x.device)
        mixed, fill = torch.zeros_like(x, dtype=torch.float32), _fill(self._fill, x)
        for weight in mixture:
            chain, _ = in_turn(x, y, self.drawn(len(x), x.device), fill, moves=False)
            mixed += weight[:, None, None, None] * chain
        m = m[:, None, None, None]
        return ((1 - m) * x + m * mixed).round_().clamp_(0, 255).to(torch.uint8), y

    def weights(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of the chains (width, N), and m (N,), 0 for an image that is left alone."""
        gamma = torch._standard_gamma(torch.full((self._width + 2, n), self._alpha, device=device))
        m = gamma[-1] / gamma[-2:].sum(0)
        chains = gamma[: self._width]
        changed = torch.rand(n, device=device) < self._p
        return chains / chains.sum(0), m * changed

    def drawn(self, n: int, device: torch.device) -> list[Drawn]:
        """The operations of one chain for each of n images, in their order."""
        most = self._depth if self._depth > 0 else 3
        u = torch.cat([torch.rand(3, most, n, device=device), torch.randn(1, most, n, device=device)]).cpu()
        depth = torch.full((n,), most) if self._depth > 0 else 1 + (3 * torch.rand(n, device=device).cpu()).long()
        steps = []
        for step in range(most):
            chosen, sign, even, normal = u[:, step]
            choice = (chosen * len(self._levels)).long()
            v = _magnitudes(self._magnitude, self._mstd, even, normal)
            which = torch.where(step < depth, self._index[choice], -1)
            steps.append(Drawn(which, _strengths(self._levels, choice, v, _signs(sign))))
        return steps


class ThreeAugment(Stage):
    """Each image grey, solarized or blurred, one of the three by chance (3-Augment, Touvron et al. 2022, sec. 3).

    Solarized at 128; blurred by a Gaussian of sigma U(0.1, 2) pixels. The paper's recipe has color_jitter at 0.3 and
    flips beside it. Masks stay as they are.

    p: share of images that are changed; sigma: 0 < least <= most, in pixels; off_epoch: as for `Stage`. Raises
    ValueError outside, InputError for other images than raw grey or RGB.
    """

    def __init__(self, *, p: float = 1.0, sigma: Sequence[float] = (0.1, 2.0), off_epoch: int | None = None) -> None:
        super().__init__(off_epoch=off_epoch)
        if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1]:
            raise ValueError(f"sigma must be two numbers of pixels, 0 < least <= most, got {list(sigma)}")
        self._p, self._sigma = probability("p", p), tuple(sigma)
        self._index = index_of(["gray", "solarize", "blur"])

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other_pixels("three_augment", x)
        return in_turn(x, y, [self.drawn(len(x), x.device)], GREY, moves=False)

    def drawn(self, n: int, device: torch.device) -> Drawn:
        """The operation of each of n images."""
        u = torch.rand(3, n, device=device).cpu()
        choice, (low, high) = (3 * u[0]).long(), self._sigma
        strength = torch.stack([torch.zeros(n), torch.full((n,), 128.0), low + (high - low) * u[1]])
        return Drawn(torch.where(u[2] < self._p, self._index[choice], -1), strength.gather(0, choice[None])[0])


class Trivial(Stage):
    """One random operation of random strength per group of images (TrivialAugment, Mueller and Hutter 2021).

    The paper draws for each image; here the batch is cut into `groups` random parts with a draw each, which is what
    makes whole-batch operations possible. Works on uint8.

    groups: draws per batch, at least 1; off_epoch: as for `Stage`. Raises ValueError below, and for images that are not
    uint8.
    """

    def __init__(self, *, groups: int = 8, off_epoch: int | None = None) -> None:
        super().__init__(off_epoch=off_epoch)
        from torchvision.transforms.v2 import TrivialAugmentWide

        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self._groups, self._transform = groups, TrivialAugmentWide()

    def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        refuse_other("trivial", x)
        refuse_picture("trivial", y, "augment=none")
        if x.dtype != torch.uint8:
            raise ValueError(f"trivial needs uint8 images, got {x.dtype}: use it on raw pixels, before scaling")
        out = x.clone()
        for part in torch.randperm(len(x), device=x.device).chunk(self._groups):
            out[part] = self._transform(x[part])
        return out, y

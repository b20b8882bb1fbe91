"""What is done to the images of a batch, each by an operation and a strength of its own: by groups of equal operation.

Images are uint8 (N, C, H, W), grey or RGB; strengths (N,). Names and units are those of timm's operations, and so is
the arithmetic of PIL below them: what is no whole number is cut off after each operation. It is that of float32,
whatever the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from knep.recipes.augment.crop import resampled

Fill = float | Sequence[float]
_CACHED = 1 << 18  # numbers that stay near a CPU's core from one step of an operation to its next
_ROUNDING = 0.05  # more than float32 loses of a pixel between its neighbours, which would be cut off as a whole step


def cut(x: Tensor) -> Tensor:
    """Values, which are overwritten, in 0..255 without their fractions, as PIL leaves them."""
    return x.clamp_(0, 255).to(torch.uint8)


def grey(x: Tensor) -> Tensor:
    """Brightness (N, 1, H, W), in whole numbers, by the weights of ITU-R 601; of grey images themselves, as float."""
    if x.shape[1] == 1:
        return x.float()
    red, green, blue = (x[:, i : i + 1].float() for i in range(3))
    shade = (red * 19595.0).add_(green, alpha=38470.0).add_(blue, alpha=7471.0)  # whole numbers below 2^24
    return shade.add_(0x8000).mul_(2**-16).floor_()


def _each(v: Tensor) -> Tensor:
    return v.reshape(-1, 1, 1, 1)


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """base + factor (x - base): factor 0 is the base, 1 the image."""
    return cut(torch.lerp(base.expand(x.shape), x.float(), _each(factor)))


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return cut(x * _each(factor))


def _colour(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(grey(x), x, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend((grey(x).mean((1, 2, 3), keepdim=True) + 0.5).floor(), x, factor)


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    if min(height, width) < 3:
        return x
    smooth = x.float()
    kernel = torch.ones(3, 3, device=x.device, dtype=smooth.dtype)
    kernel[1, 1] = 5
    inner = F.conv2d(smooth.reshape(n * channels, 1, height, width), kernel[None, None] / 13)
    smooth = smooth.clone()
    smooth[:, :, 1:-1, 1:-1] = (inner + 0.5).floor().reshape(n, channels, height - 2, width - 2)
    return _blend(smooth, x, factor)


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    step = torch.exp2(8 - _each(bits)).int()
    return (x.int() - x.int() % step).to(torch.uint8)


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x >= _each(threshold), 255 - x, x)


def _solarize_add(x: Tensor, amount: Tensor) -> Tensor:
    return torch.where(x < 128, cut(x + _each(amount)), x)


def _auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import autocontrast

    return autocontrast(x)


def _equalize(x: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import equalize

    return equalize(x)


def _invert(x: Tensor, _: Tensor) -> Tensor:
    return 255 - x


def _grey(x: Tensor, _: Tensor) -> Tensor:
    return cut(grey(x).clone()).expand_as(x)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, sigma in pixels, the border's pixels going on beyond it."""
    weights = [_gaussian(sigma, size) for size in x.shape[-2:]]
    return resampled(x, *weights)


def _gaussian(sigma: Tensor, size: int) -> Tensor:
    """(N, size, size): of the pixels of a line in each blurred one, as far as 4 sigma."""
    reach = math.ceil(4 * float(sigma.max()))
    place = torch.arange(-reach, reach + 1, device=sigma.device)
    tap = torch.exp(-0.5 * (place / sigma[:, None].clamp_min(1e-6)) ** 2)
    tap = tap / tap.sum(1, keepdim=True)
    row = torch.arange(size, device=sigma.device)[:, None]
    to = (row + place).clamp(0, size - 1).expand(len(sigma), -1, -1)
    weights = torch.zeros(len(sigma), size, size, device=sigma.device, dtype=tap.dtype)
    return weights.scatter_add_(2, to, tap[:, None].expand(to.shape))


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """turn: of the whole circle of hues, in [-0.5, 0.5]; by way of HSV (Smith 1978)."""
    if x.shape[1] == 1:
        return x
    values = x.float()
    most, least = values.amax(1), values.amin(1)
    chroma = most - least
    red, green, blue = values.unbind(1)
    width = chroma.clamp_min(1e-6)
    of_green = torch.where(most == green, 2 + (blue - red) / width, 4 + (red - green) / width)
    sixth = torch.where(most == red, (green - blue) / width, of_green) + 6 * turn[:, None, None]
    planes = []
    for start in (5, 3, 1):
        k = (start + sixth) % 6
        planes.append(most - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return cut(torch.stack(planes, 1) + 0.5)


_COLOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _colour,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "hue": _hue,
    "gray": _grey,
    "blur": _blur,
}


def _rotate(v: Tensor, height: int, width: int) -> Sequence[Tensor | float]:
    """v: degrees, against the clock."""
    angle = torch.deg2rad(-v)
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# (a, b, c, d, e, f): what stands at (x, y) is taken from (a x + b y + c, d x + e y + f), in pixels.
_MOVES: dict[str, Callable[[Tensor, int, int], Sequence[Tensor | float]]] = {
    "rotate": _rotate,
    "shear_x": lambda v, height, width: (1, v, 0, 0, 1, 0),
    "shear_y": lambda v, height, width: (1, 0, 0, v, 1, 0),
    "translate_x": lambda v, height, width: (1, 0, v * width, 0, 1, 0),
    "translate_y": lambda v, height, width: (1, 0, 0, 0, 1, v * height),
}
NAMES = (*_COLOURS, *_MOVES)


@dataclass(frozen=True)
class Drawn:
    """An operation for each image. which: index in NAMES, -1 for none; strength: in the unit of each. Both (N,), on
    the CPU, for a device would be waited for to know which images are one group."""

    which: Tensor
    strength: Tensor


def perform(x: Tensor, drawn: Drawn, fill: Fill, picture: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Each image by its operation; a picture (N, H, W) or (N, K, H, W) moves with it, where 0 enters."""
    out, moves = x.clone(), []
    together = max(1, _CACHED // x[0].numel()) if x.device.type == "cpu" else len(x)
    for index in drawn.which.unique().tolist():
        rows = (drawn.which == index).nonzero()[:, 0]
        if index < 0:
            continue
        name = NAMES[index]
        if name in _MOVES:
            moves.append((name, rows))
            continue
        for part in rows.split(together):
            here = part.to(x.device)
            changed = _COLOURS[name](x.index_select(0, here), drawn.strength[part].to(x.device, torch.float32))
            out.index_copy_(0, here, changed)
    if moves:
        rows = torch.cat([rows for _, rows in moves])
        matrix = torch.cat([_matrix(name, drawn.strength[rows], *x.shape[-2:]) for name, rows in moves]).to(x.device)
        here = rows.to(x.device)
        moved = _moved(x.index_select(0, here).float(), matrix, fill, "bilinear")
        out.index_copy_(0, here, cut(moved.add_(_ROUNDING)))
        if picture is not None:
            picture = picture.clone()
            picture[here] = _moved_picture(picture[here], matrix)
    return out, picture


def _matrix(name: str, strength: Tensor, height: int, width: int) -> Tensor:
    """(N, 2, 3)"""
    parts = [
        torch.as_tensor(v, dtype=torch.float32).expand(len(strength)) for v in _MOVES[name](strength, height, width)
    ]
    return torch.stack(parts, 1).reshape(-1, 2, 3)


def _moved(x: Tensor, matrix: Tensor, fill: Fill, mode: str) -> Tensor:
    """What comes from beyond the image is `fill`, a number or one for each channel."""
    n, _, height, width = x.shape
    columns = torch.arange(width, device=x.device, dtype=x.dtype) + 0.5
    rows = torch.arange(height, device=x.device, dtype=x.dtype) + 0.5
    at = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width), torch.ones_like(x[0, 0])], -1)
    source = at.reshape(1, -1, 3) @ matrix.to(x.dtype).mT
    size = torch.tensor([width, height], device=x.device, dtype=x.dtype)
    outside = ((source < 0) | (source >= size)).any(-1).reshape(n, 1, height, width)
    grid = (2 * source / size - 1).reshape(n, height, width, 2)
    got = F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)
    colour = torch.as_tensor(fill, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1)
    return torch.where(outside, colour, got)


def _moved_picture(y: Tensor, matrix: Tensor) -> Tensor:
    planes = (y if y.dim() == 4 else y[:, None]).float()
    moved = _moved(planes, matrix, 0.0, "nearest").to(y.dtype)
    return moved if y.dim() == 4 else moved[:, 0]


def index_of(names: Sequence[str]) -> Tensor:
    """Operations by name, as indices in NAMES."""
    return torch.tensor([NAMES.index(name) for name in names])


def in_turn(x: Tensor, y: Tensor, steps: Sequence[Drawn], fill: Fill, moves: bool) -> tuple[Tensor, Tensor]:
    """Operations one after another; moves: whether y is an image that moves with x."""
    picture = y if moves else None
    for drawn in steps:
        x, picture = perform(x, drawn, fill, picture)
    return x, y if picture is None else picture

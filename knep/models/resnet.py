"""Residual nets: the small-image family of He et al. 2015, table 6, and the ImageNet family of their table 1."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from knep.errors import InputError
from knep.nn.blocks import Activation, Norm, norm_at
from knep.nn.place import Place, ZeroGain
from knep.utils.validation import check

# Depth -> blocks in each stage. Small images: three stages of 16, 32, 64 channels. ImageNet: four, from 64.
_SMALL = {depth: (depth // 6,) * 3 for depth in (20, 32, 44, 56, 110)}
_BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
DEPTHS = (*_SMALL, *_BASIC, *_BOTTLENECK)


@dataclass(frozen=True)
class _Style:
    """What all blocks of one net have in common."""

    norm: Norm | None
    activation: Activation
    bottleneck: bool
    project: bool
    preact: bool
    zero_init: bool

    def conv(self, channels_in: int, channels: int, kernel: int, stride: int = 1, *, normed: bool = True) -> nn.Conv2d:
        """Without bias where a norm follows directly; in a place, the norm that fills it takes the bias away."""
        bias = normed and self.norm is None
        return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=bias)

    def last_norm(self, channels: int) -> nn.Module:
        if not self.zero_init or self.preact:
            return norm_at(self.norm, channels)
        if self.norm is None:
            return ZeroGain("norm", channels)
        norm = self.norm(channels)
        if not isinstance(norm.weight, Tensor):
            raise InputError("zero_init_residual needs a norm with a gain")
        nn.init.zeros_(norm.weight)
        return norm

    def act(self, i: int, channels: int) -> dict[str, nn.Module]:
        return {f"act{i}": self.activation(), f"norm_after{i}": Place("norm_after", channels)}


class PadShortcut(nn.Module):
    """(N, C, H, W) to (N, C + more, H/stride, W/stride): drops pixels and adds channels of zeros, without parameters
    (He et al. 2015, option A).
    """

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))

    def extra_repr(self) -> str:
        return f"+{self.more} channels, stride={self.stride}"


def _convolutions(style: _Style, channels_in: int, width: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(channels in, channels out, kernel, stride) of a branch's convolutions; the stride is on the first 3x3."""
    if style.bottleneck:
        return [(channels_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
    return [(channels_in, width, 3, stride), (width, width, 3, 1)]


def _branch(style: _Style, channels_in: int, width: int, stride: int, depth: float) -> nn.Sequential:
    """convolution, norm, activation, ..., convolution, norm; with preact (norm, activation), convolution, ..."""
    parts: dict[str, nn.Module] = {}
    convolutions = _convolutions(style, channels_in, width, stride)
    for i, (before, after, kernel, step) in enumerate(convolutions, start=1):
        last = i == len(convolutions)
        parts[f"conv{i}"] = style.conv(before, after, kernel, step, normed=not (last and style.preact))
        if not last:
            parts |= {f"norm{i}": norm_at(style.norm, after), **style.act(i, after)}
        elif not style.preact:
            parts[f"norm{i}"] = style.last_norm(after)
    return nn.Sequential(OrderedDict({**parts, "residual": Place("residual", convolutions[-1][1], depth)}))


def _shortcut(style: _Style, channels_in: int, channels: int, stride: int) -> nn.Module:
    if channels_in == channels and stride == 1:
        return nn.Identity()
    if not style.project:
        return PadShortcut(channels - channels_in, stride)
    conv = style.conv(channels_in, channels, 1, stride, normed=not style.preact)
    return conv if style.preact else nn.Sequential(OrderedDict(conv=conv, norm=norm_at(style.norm, channels)))


def _gained(style: _Style, channels_in: int, channels: int) -> _Style:
    """The style of a branch beside a shortcut that adds channels of zeros: were the branch zero as well, those would
    stand at ReLU's corner, where it has no gradient, for good.
    """
    pads = not style.project and channels_in != channels
    return replace(style, zero_init=False) if pads else style


class Block(nn.Module):
    """activation(branch(x) + shortcut(x)), He et al. 2015, fig. 2 and 5."""

    def __init__(self, style: _Style, channels_in: int, width: int, stride: int, depth: float) -> None:
        super().__init__()
        channels = width * (4 if style.bottleneck else 1)
        self.branch = _branch(_gained(style, channels_in, channels), channels_in, width, stride, depth)
        self.shortcut = _shortcut(style, channels_in, channels, stride)
        self.out = nn.Sequential(OrderedDict(style.act(1, channels)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.branch(x) + self.shortcut(x))


class PreactBlock(nn.Module):
    """branch(pre(x)) + x, He et al. 2016, fig. 1b: nothing stands on the way from block to block.

    A projection, where the shape changes, reads pre(x) as in the authors' code.
    """

    def __init__(self, style: _Style, channels_in: int, width: int, stride: int, depth: float) -> None:
        super().__init__()
        self.pre = _pre(style, channels_in)
        self.branch = _branch(style, channels_in, width, stride, depth)
        self.shortcut = _shortcut(style, channels_in, width * (4 if style.bottleneck else 1), stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pre(x)
        return self.branch(h) + self.shortcut(h if isinstance(self.shortcut, nn.Conv2d) else x)


def _pre(style: _Style, channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(norm=norm_at(style.norm, channels), **style.act(1, channels)))


class ResNet(nn.Module):
    """Stem, stages of residual blocks, mean over all pixels, linear classifier. See `resnet`."""

    def __init__(
        self, style: _Style, in_channels: int, num_classes: int, blocks: tuple[int, ...], width: int, large_stem: bool
    ) -> None:
        super().__init__()
        self.stem = self._stem(style, in_channels, width, large_stem)
        self.stages = nn.Sequential()
        channels, done = width, 0
        for i, count in enumerate(blocks):
            stage = nn.Sequential()
            for j in range(count):
                done += 1
                block = PreactBlock if style.preact else Block
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(block(style, channels, width << i, stride, done / sum(blocks)))
                channels = (width << i) * (4 if style.bottleneck else 1)
            stage.append(Place("features", channels))
            self.stages.append(stage)
        self.last = _pre(style, channels) if style.preact else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = Place("head", channels)
        self.classifier = nn.Linear(channels, num_classes)

    @staticmethod
    def _stem(style: _Style, in_channels: int, width: int, large: bool) -> nn.Sequential:
        conv = style.conv(in_channels, width, 7 if large else 3, 2 if large else 1, normed=not style.preact)
        parts: dict[str, nn.Module] = {"conv": conv}
        if not style.preact:
            parts |= {"norm": norm_at(style.norm, width), **style.act(1, width)}
        if large:
            parts["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
        return nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.stages(self.stem(x)))
        return self.classifier(self.dropout(self.pool(x).flatten(1)))


def resnet(
    in_channels: int,
    num_classes: int,
    image_size: int,
    *,
    depth: int = 20,
    width: float = 1.0,
    stem: Literal["auto", "small", "large"] = "auto",
    preact: bool = False,
    zero_init_residual: bool = False,
    norm: Norm | None = nn.BatchNorm2d,
    activation: Activation = nn.ReLU,
) -> ResNet:
    """Images (N, in_channels, image_size, image_size) to class scores (N, num_classes) through residual blocks, each
    of which adds a correction to its input (He et al. 2015; Wide ResNets: Zagoruyko and Komodakis 2016).

    Places: norm and norm_after, residual at the end of each branch, features behind each stage, head before the
    classifier. The parameters are those of the papers, and of torchvision for 18 to 152 layers.

    depth: layers; 20, 32, 44, 56, 110 have three stages from 16 channels and parameter-free shortcuts, 18, 34 four
    stages from 64 channels, 50, 101, 152 the same with bottlenecks.
    width: factor on all channels. stem: small is a 3x3 convolution, large a 7x7 with stride 2 and max pooling, which
    keeps 1/16 of the pixels; auto is large above 96 pixels.
    preact: norm and activation before each convolution (He et al. 2016).
    zero_init_residual: blocks start as the identity, by a gain of 0 in the last norm of each branch; but for those
    whose shortcut adds channels of zeros.
    norm: None leaves the places.
    Raises InputError for an unknown depth or stem, a width that leaves no channel, or zero_init_residual with preact.
    """
    if depth not in DEPTHS:
        raise InputError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
    if stem not in ("auto", "small", "large"):
        raise InputError(f"stem must be small, large or auto, got {stem}")
    if preact and zero_init_residual:
        raise InputError("zero_init_residual needs the norm at the end of a branch, which preact moves: choose one")
    check("width", width, "(0, inf)")
    channels = round(width * (16 if depth in _SMALL else 64))
    if channels < 1:
        raise InputError(f"width must leave at least one channel, got {width}")
    style = _Style(norm, activation, depth in _BOTTLENECK, depth not in _SMALL, preact, zero_init_residual)
    blocks = (_SMALL | _BASIC | _BOTTLENECK)[depth]
    large = stem == "large" or (stem == "auto" and image_size > 96)
    return ResNet(style, in_channels, num_classes, blocks, channels, large)

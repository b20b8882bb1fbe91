"""Layers that models and recipes are built of where torch has none that fits, and a look at how a signal passes them.

Shapes: N images, C channels, H x W pixels. "(N, C, ...)" is (N, C) behind a fully connected layer and (N, C, H, W)
behind a convolution; the norms here take both.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision import ops

from knep.errors import InputError
from knep.surgery.edit import Place
from knep.utils.validation import check

Norm = Callable[[int], nn.Module]
Activation = Callable[[], nn.Module]

# What bends the signal between two layers.
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
)
# What does so, or gates another signal: an activation only where a module reads its output directly.
GATES = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid)


class ZeroGain(Place):
    """A norm place at the end of a residual branch: the norm that fills it starts with gain 0, so that the block
    starts as the identity (Goyal et al. 2017, sec. 5.1).
    """


def whole(name: str, value: object, least: int) -> None:
    """InputError unless `value` is a whole number from `least` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number from {least} on, got {value}")


def norm_at(norm: Norm | None, features: int) -> nn.Module:
    """The norm for `features` channels, or the place where the norm slot puts one."""
    return Place("norm", features) if norm is None else norm(features)


def conv_unit(
    channels_in: int, channels: int, kernel: int, *, norm: Norm | None, activation: Activation, stride: int = 1
) -> nn.Sequential:
    """(N, channels_in, H, W) to (N, channels, H/stride, W/stride): convolution, norm, activation.

    The convolution has a bias only where a place is left; the norm that fills the place takes it away.
    """
    conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=norm is None)
    parts = {
        "conv": conv,
        "norm": norm_at(norm, channels),
        "act": activation(),
        "norm_after": Place("norm_after", channels),
    }
    return nn.Sequential(OrderedDict(parts))


def fewest_values(name: str, shape: torch.Size, per_set: int, path: str = "") -> None:
    """InputError where statistics would be taken over fewer than two values, which turns every signal into 0."""
    if per_set < 2:
        where = f"{path}, " if path else ""
        raise InputError(
            f"norm.{name} would take mean and variance of a single value at {where}a signal of shape {tuple(shape)}: "
            f"use norm={'batch or rms' if name == 'layer' else 'layer or batch'}"
        )


class BatchNorm(_BatchNorm):
    """Gives each channel mean 0 and variance 1 over the batch (Ioffe and Szegedy 2015), of (N, C, ...)."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes (N, C, ...), got shape {tuple(input.shape)}")


class GhostBatchNorm(BatchNorm):
    """Batch norm over parts of the batch, as if it were smaller (Hoffer et al. 2017, algorithm 1).

    A batch of N is cut into N // ghost_size parts of at least ghost_size images each; the running statistics take one
    step per part. In eval mode it is batch norm.
    """

    def __init__(self, num_features: int, *, ghost_size: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.ghost_size = ghost_size

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        parts = input.tensor_split(max(1, len(input) // self.ghost_size))
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in parts])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class GroupNorm(nn.GroupNorm):
    """Gives each group of channels mean 0 and variance 1 in each image (Wu and He 2018), of (N, C, ...).

    One group is layer norm (Ba et al. 2016). Raises InputError where a group has a single value.
    """

    def forward(self, input: Tensor) -> Tensor:
        values = input.shape[1:].numel() // self.num_groups
        fewest_values("group" if self.num_groups > 1 else "layer", input.shape, values)
        return super().forward(input)


class InstanceNorm(_InstanceNorm):
    """Gives each channel of each image mean 0 and variance 1 (Ulyanov et al. 2016), of (N, C, H, W).

    Raises InputError where a channel has a single value, as behind a fully connected layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        fewest_values("instance", input.shape, input.shape[2:].numel())
        return F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)


class RMSNorm(nn.Module):
    """Divides each image's signal by its root mean square over all other axes, of (N, C, ...), gain per channel.

    y = g x / sqrt(mean(x^2) + eps), Zhang and Sennrich 2019, eq. 4. A bias b is added only where it comes from a norm
    that this one takes the place of.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, num_features: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        channels = (-1, *[1] * (x.dim() - 2))
        y = F.rms_norm(x, x.shape[1:], eps=self.eps)
        if self.weight is not None:
            y = y * self.weight.view(channels)
        return y if self.bias is None else y + self.bias.view(channels)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class LastRMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last axes, which can keep the bias of the nn.LayerNorm that it takes the place of."""

    bias: Tensor | None

    def __init__(self, normalized_shape: list[int], *, eps: float = 1e-6) -> None:
        super().__init__(normalized_shape, eps=eps)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.bias is None else y + self.bias


class PixelRMSNorm(LastRMSNorm):
    """The same over the channels of each pixel of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@lru_cache(maxsize=256)
def _seed_rate(height: int, width: int, block: int, p: float) -> float:
    """The rate of block centers at which the share p of a map is covered, blocks overlapping and cut at no edge."""

    def covers(size: int) -> list[int]:  # how many of the size - block + 1 positions of a block cover each pixel
        return [min(i + 1, size - i, block, size - block + 1) for i in range(size)]

    counts = Counter(a * b for a in covers(height) for b in covers(width))
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        covered = 1 - sum(pixels * (1 - rate) ** n for n, pixels in counts.items()) / (height * width)
        low, high = (rate, high) if covered < p else (low, rate)
    return low


class DropBlock(nn.Module):
    """In training, zeroes squares of each feature map (N, C, H, W) and scales the rest to keep the batch's mean
    (Ghiasi et al. 2018, algorithm 1). Identity in eval mode and for p = 0.

    p: expected share of zeroed values, in [0, 1). The paper's rate of block centers ignores that blocks overlap, which
    zeroes 40 % for p = 0.5; here it is solved so that the share is p.
    block_size: pixels, odd; larger than the map it is cut to the largest odd size that fits.
    """

    def __init__(self, p: float, block_size: int) -> None:
        super().__init__()
        check("p", p, "[0, 1)")
        whole("block_size", block_size, 1)
        if block_size % 2 == 0:
            raise InputError(f"block_size must be odd, so that a block has a middle, got {block_size}")
        self.p, self.block_size = p, block_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        n, c, h, w = x.shape
        block = min(self.block_size, h - 1 + h % 2, w - 1 + w % 2)
        rate = _seed_rate(h, w, block, self.p)
        centers = torch.empty(n, c, h - block + 1, w - block + 1, dtype=x.dtype, device=x.device).bernoulli_(rate)
        keep = 1 - F.max_pool2d(F.pad(centers, [block // 2] * 4), block, stride=1, padding=block // 2)
        kept = keep.mean(dtype=torch.float32 if x.dtype.itemsize < 4 else None)
        return x * keep / kept.clamp(min=1 / keep.numel()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, block_size={self.block_size}"


class StochasticDepth(ops.StochasticDepth):
    """torchvision's, which zeroes all of an image's signal with probability p, and says so when printed."""

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        return f"p={self.p:.4g}, mode={self.mode}"


class Copy(nn.Module):
    """Hands on a copy: what changes it in place leaves the original, which a backward pass may need."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


@dataclass(frozen=True)
class Call:
    """One call of a module: its first tensor in, the tensor out, and how often that had been changed in place."""

    module: nn.Module
    input: Tensor
    output: Tensor
    version: int


def calls(model: nn.Module, sample: Tensor, *, training: bool = False) -> list[Call]:
    """The calls of all submodules, in the order in which they end, when the model reads two images of `sample`.

    The model runs without gradients, in eval mode, so that nothing in it changes; or, for the parts that act only
    then, in training mode, whose buffers are restored. Every module's own mode is restored.
    Calls that take or give something other than a tensor are left out.
    """
    seen: list[Call] = []

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            seen.append(Call(module, inputs[0], output, output._version))

    modes = {m: m.training for m in model.modules()}
    buffers = {b: b.clone() for b in model.buffers()} if training else {}
    images = sample[:2] if len(sample) > 1 or not training else sample.expand(2, *sample.shape[1:])
    hooks = [m.register_forward_hook(note) for m in model.modules() if m is not model]
    try:
        with torch.no_grad(), torch.random.fork_rng(enabled=training):
            model.train(training)(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers.items():
            buffer.data.copy_(value)
    return seen


def classifier_of(model: nn.Module, sample: Tensor | None) -> nn.Module | None:
    """The linear layer or convolution that acts last when the model reads `sample`; without, the last registered."""
    kinds = (nn.Linear, _ConvNd)
    if sample is not None:
        return next((call.module for call in reversed(calls(model, sample)) if isinstance(call.module, kinds)), None)
    return next((m for m in reversed(list(model.modules())) if isinstance(m, kinds)), None)

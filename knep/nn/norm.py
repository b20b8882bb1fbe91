"""Layers that models and recipes are built of where torch has none that fits, and a look at how a signal passes them.

Shapes: N images, C channels, H x W pixels. "(N, C, ...)" is (N, C) behind a fully connected layer and (N, C, H, W)
behind a convolution; the norms here take both. All of them can be scripted by `torch.jit.script`, which does not look
at how many values a set has.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from knep.errors import InputError


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
            raise ValueError(f"batch norm takes (N, C, ...), got a signal of {input.dim()} axes")

    def batch(self, input: Tensor) -> Tensor:
        """torch's own batch norm of (N, C, ...), for classes derived from this one: TorchScript knows no super()."""
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        own = self.training or (self.running_mean is None and self.running_var is None)
        keeps = not self.training or self.track_running_stats
        mean, var = self.running_mean if keeps else None, self.running_var if keeps else None
        return F.batch_norm(input, mean, var, self.weight, self.bias, own, factor, self.eps)

    def axis_1(self, input: Tensor) -> Tensor:
        """The norm of a signal whose channels are axis 1."""
        return self.batch(input)


class GhostBatchNorm(BatchNorm):
    """Batch norm over parts of the batch, as if it were smaller (Hoffer et al. 2017, algorithm 1).

    A batch of N is cut into N // ghost_size parts of at least ghost_size images each; the running statistics take one
    step per part. In eval mode it is batch norm.
    """

    def __init__(self, num_features: int, *, ghost_size: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.ghost_size = ghost_size

    def axis_1(self, input: Tensor) -> Tensor:
        if not self.training:
            return self.batch(input)
        parts = input.tensor_split(max(1, input.shape[0] // self.ghost_size))
        return torch.cat([self.batch(part) for part in parts])

    def forward(self, input: Tensor) -> Tensor:
        return self.axis_1(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class GroupNorm(nn.GroupNorm):
    """Gives each group of channels mean 0 and variance 1 in each image (Wu and He 2018), of (N, C, ...).

    One group is layer norm (Ba et al. 2016). Raises InputError where a group has a single value.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            values = input.shape[1:].numel() // self.num_groups
            fewest_values("group" if self.num_groups > 1 else "layer", input.shape, values)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class InstanceNorm(_InstanceNorm):
    """Gives each channel of each image mean 0 and variance 1 (Ulyanov et al. 2016), of (N, C, H, W).

    Raises InputError where a channel has a single value, as behind a fully connected layer.
    """

    def axis_1(self, input: Tensor) -> Tensor:
        """The norm of a signal whose channels are axis 1."""
        if not torch.jit.is_scripting():
            fewest_values("instance", input.shape, input.shape[2:].numel())
        return F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)

    def forward(self, input: Tensor) -> Tensor:
        return self.axis_1(input)


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
        channels = [-1] + [1] * (x.dim() - 2)
        y = F.rms_norm(x, x.shape[1:], eps=self.eps)
        weight, bias = self.weight, self.bias
        if weight is not None:
            y = y * weight.view(channels)
        return y if bias is None else y + bias.view(channels)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class LastRMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last axes, which can keep the bias of the nn.LayerNorm that it takes the place of."""

    bias: Tensor | None

    def __init__(self, normalized_shape: list[int], *, eps: float = 1e-6) -> None:
        super().__init__(normalized_shape, eps=eps)
        self.register_parameter("bias", None)

    def last(self, x: Tensor) -> Tensor:
        """The norm of a signal whose channels are the last axes."""
        y = F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        bias = self.bias
        return y if bias is None else y + bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


class PixelRMSNorm(LastRMSNorm):
    """The same over the channels of each pixel of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LastAxis:
    """Marks a norm whose channels are the last axis, and moves them to axis 1 for the norm that it is mixed into.

    What it gives is contiguous, as of layer norm, for what follows may view it in another shape.
    """

    def forward(self, input: Tensor) -> Tensor:
        own = self.axis_1(input.movedim(-1, 1))  # pyright: ignore[reportAttributeAccessIssue]
        return own.movedim(1, -1).contiguous()


class TokenBatchNorm(LastAxis, BatchNorm):
    """Gives each channel mean 0 and variance 1 over batch and tokens (Yao et al. 2021, Leveraging Batch Normalization
    for Vision Transformers), running ones in eval, of (N, ..., C).
    """


class TokenGhostBatchNorm(LastAxis, GhostBatchNorm):
    """The same over parts of the batch, each with all tokens of its images."""


class TokenInstanceNorm(LastAxis, InstanceNorm):
    """Gives each channel of each image mean 0 and variance 1 over its tokens, of (N, ..., C).

    A token's output depends on all tokens of its image, later ones too: not for models that predict the next token.
    """


class TokenGroupNorm(GroupNorm):
    """Gives each group of channels of each token mean 0 and variance 1, of (N, ..., C); no token sees another."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            fewest_values("group", torch.Size(input.shape[-1:]), input.shape[-1] // self.num_groups)
        rows = input.reshape(-1, input.shape[-1])
        return F.group_norm(rows, self.num_groups, self.weight, self.bias, self.eps).view(input.shape)


class WeightStandardization(nn.Module):
    """A parametrization: (w - mean) / sqrt(var + eps) over each filter's own weights, channels x taps.

    Qiao et al. 2019, eq. 5 to 7, with the variance of all and no correction.

    transposed: groups of a transposed convolution, whose weight is (in, out / groups, taps); None of any other,
    (out, in / groups, taps).
    """

    def __init__(self, eps: float, transposed: int | None = None) -> None:
        super().__init__()
        self.eps, self.transposed = eps, transposed

    def forward(self, weight: Tensor) -> Tensor:
        if self.transposed is None:
            return self._standard(weight, list(range(1, weight.dim())))
        grouped = weight.unflatten(0, (self.transposed, -1))
        return self._standard(grouped, [1, *range(3, grouped.dim())]).flatten(0, 1)

    def _standard(self, weight: Tensor, axes: list[int]) -> Tensor:
        var, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
        return (weight - mean) * torch.rsqrt(var + self.eps)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What an init draws is kept as it is; the layer computes with its standardized values."""
        return weight

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

"""Norms whose channels are the last axis, for signals of tokens (N, ..., C): what transformers put layer norm in.

N images, "..." the positions of a token (a sequence (T,), or rows and columns (H, W)), C channels. On (N, C) they are
the norms of `knep.nn.norm`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from knep.nn.norm import BatchNorm, GhostBatchNorm, GroupNorm, InstanceNorm, fewest_values


class LastAxis:
    """Marks a norm whose channels are the last axis, and moves them to axis 1 for the norm that it is mixed into."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(-1, 1)).movedim(1, -1)  # pyright: ignore[reportAttributeAccessIssue]


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
        fewest_values("group", torch.Size(input.shape[-1:]), input.shape[-1] // self.num_groups)
        rows = input.reshape(-1, input.shape[-1])
        return F.group_norm(rows, self.num_groups, self.weight, self.bias, self.eps).view(input.shape)
